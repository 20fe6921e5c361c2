"""Rotary position embedding: its frequencies, and how config.json describes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dlo_export.checkpoints.files.json_fields import JsonFields, is_positive

RopeKind = Literal["default", "linear", "llama3", "dynamic", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)

_ORIGINAL = "original_max_position_embeddings"
_SCALED_FROM_ORIGINAL: tuple[RopeKind, ...] = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over the whole head.

    Attributes:
        kind: How the frequencies are scaled for contexts longer than trained on.
        theta: Base of the geometric sequence of wavelengths.
        factor: By how much the context was lengthened. A divisor of the frequencies (linear: of all, llama3 and yarn:
            of the low ones); dynamic: how fast theta grows with the length.
        low_freq_factor: llama3 only: wavelengths above original_max_position / low_freq_factor are fully scaled.
        high_freq_factor: llama3 only: wavelengths below original_max_position / high_freq_factor are left alone.
        original_max_position: llama3, dynamic, yarn and longrope: context length before scaling, in tokens.
        attention_factor: yarn and longrope: what cosines and sines are multiplied by.
        beta_fast: yarn only: frequencies that turn more often than this in the original context are left alone.
        beta_slow: yarn only: those that turn less often are fully scaled.
        truncate: yarn only: whether the pairs at which both begin are rounded to whole ones.
        short_factors: longrope only: divisors of the frequencies up to the original context, head_dim / 2 of them.
        long_factors: longrope only: those of steps that reach beyond it.
    """

    kind: RopeKind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies depend on how far a step reaches: the same tokens in other steps are turned otherwise.

        transformers does the same: what is in the cache stays as it was turned when it was written.
        """
        return self.kind in ("dynamic", "longrope")

    def parameters(self) -> dict[str, Any]:
        """The same as `rope_parameters` of transformers 5; dynamic takes its context from max_position_embeddings."""
        values: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            values["factor"] = self.factor
        if self.kind in _SCALED_FROM_ORIGINAL:
            values[_ORIGINAL] = self.original_max_position
        if self.kind == "llama3":
            values |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind in ("yarn", "longrope"):
            values["attention_factor"] = self.attention_factor
        if self.kind == "yarn":
            values |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
        if self.kind == "longrope":
            values |= {"short_factor": list(self.short_factors), "long_factor": list(self.long_factors)}
        return values

    def inverse_frequencies(self, head_dim: int, *, beyond_original: bool = False) -> np.ndarray:
        """Radians per token of each rotated pair, float32 [head_dim / 2], as transformers computes them.

        Args:
            head_dim: Of queries and keys.
            beyond_original: longrope only: for a step that reaches beyond the original context.

        Returns:
            For dynamic, those up to the original context. A step that reaches beyond it has another theta, which
            depends on how far it reaches and is computed with the step.

        Source: RoFormer (arXiv 2104.09864) §3.2; the llama3 rule is the one published with Llama 3.1; YaRN
        (arXiv 2309.00071) §3.2; LongRoPE (arXiv 2402.13753).
        """
        # Rounded to float32 after each step, like the PyTorch reference: a last-bit difference grows with the position.
        # NumPy's float32 power is often off by one bit, PyTorch's hardly ever, hence the detour over float64.
        periods = np.power(self.theta, self.exponents(head_dim).astype(np.float64)).astype(np.float32)
        if self.kind == "longrope":
            divisors = np.array(self.long_factors if beyond_original else self.short_factors, np.float32)
            periods = divisors * periods
        frequencies = np.float32(1.0) / periods
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3_frequencies(frequencies)
        if self.kind == "yarn":
            return self._yarn_frequencies(frequencies, np.float32(1.0) / (np.float32(self.factor) * periods))
        return frequencies

    @staticmethod
    def exponents(head_dim: int) -> np.ndarray:
        """What theta is raised to for the wavelength of each pair, float32 [head_dim / 2]."""
        return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)

    def _llama3_frequencies(self, frequencies: np.ndarray) -> np.ndarray:
        wavelengths = np.float32(2 * math.pi) / frequencies
        longest_kept = np.float32(self.original_max_position / self.high_freq_factor)
        shortest_scaled = np.float32(self.original_max_position / self.low_freq_factor)
        scaled = frequencies / np.float32(self.factor)
        # Between the two, blend from kept to scaled by the number of turns within the original context.
        turns = np.float32(self.original_max_position) / wavelengths
        span = np.float32(self.high_freq_factor - self.low_freq_factor)
        kept_share = (turns - np.float32(self.low_freq_factor)) / span
        blended = (np.float32(1.0) - kept_share) * frequencies / np.float32(self.factor) + kept_share * frequencies
        return np.where(
            wavelengths > shortest_scaled, scaled, np.where(wavelengths < longest_kept, frequencies, blended)
        )

    def _yarn_frequencies(self, kept: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        head_dim = 2 * len(kept)
        # The pairs at which a frequency turns beta times within the original context; between them, a linear ramp.
        first, last = (
            head_dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last = last + 0.001 if first == last else last  # transformers' way around a division by zero
        ramp = (np.arange(len(kept), dtype=np.float32) - np.float32(first)) / np.float32(last - first)
        kept_share: np.ndarray = np.float32(1.0) - np.clip(ramp, 0, 1)
        frequencies: np.ndarray = scaled * (np.float32(1.0) - kept_share) + kept * kept_share
        return frequencies


def rope_of_fields(fields: JsonFields, max_position_embeddings: int, head_dim: int) -> RopeConfig:
    """Reads transformers 5's `rope_parameters`, or 4's `rope_theta` and `rope_scaling`.

    Args:
        fields: Of config.json; problems are noted there.
        max_position_embeddings: Where a kind does not say what context it was scaled from.
        head_dim: Of queries and keys.
    """
    values = fields.values
    # Precedence as in transformers 5: an old-style rope_scaling, if any, over rope_parameters.
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    parameters = values.get(name) or {}
    if not isinstance(parameters, dict):
        fields.problem(name, f"is {parameters!r}, expected an object")
        parameters = {}
    rope = fields.nested(name, parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        fields.problem(name, "differs by layer type, expected one set for all layers")
    theta = (
        rope.positive_number("rope_theta")
        if parameters.get("rope_theta") is not None
        else fields.positive_number("rope_theta", default=10_000.0)
    )
    for source in (rope, fields):
        share = source.values.get("partial_rotary_factor")
        if share is not None and share != 1:
            source.problem("partial_rotary_factor", f"is {share!r}, expected 1 (the whole head is rotated)")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or kind not in _READERS:
        rope.problem("rope_type", f"is {kind!r}, expected one of {', '.join(ROPE_KINDS)}")
        kind = "default"
    read = _READERS[kind](_RopeFields(rope, theta, max_position_embeddings, head_dim))
    # transformers reads the one inside alone, from 5.23 on; older ones let another outside overrule it.
    outside = values.get(_ORIGINAL)
    if outside is not None and kind in _SCALED_FROM_ORIGINAL and outside != read.original_max_position:
        taken = f"transformers takes {read.original_max_position}, by {name} alone"
        fields.problem(_ORIGINAL, f"is {outside!r}, but {taken}; expected {name}.{_ORIGINAL} alike")
    return read


@dataclass(frozen=True)
class _RopeFields:
    """What the readers of the kinds read.

    Attributes:
        rope: The nested object's fields.
        theta: Read already.
        max_position: Of the model.
        head_dim: Likewise.
    """

    rope: JsonFields
    theta: float
    max_position: int
    head_dim: int

    def original(self) -> int:
        """The context before scaling."""
        return self.rope.integer(_ORIGINAL, default=self.max_position)

    def given_factor(self, original: int) -> float:
        """By how much the context was lengthened: as the file says, or as its two lengths do."""
        return self.rope.positive_number("factor", default=self.max_position / original)


def _default(fields: _RopeFields) -> RopeConfig:
    return RopeConfig("default", fields.theta)


def _linear(fields: _RopeFields) -> RopeConfig:
    return RopeConfig("linear", fields.theta, factor=fields.rope.positive_number("factor"))


def _llama3(fields: _RopeFields) -> RopeConfig:
    rope = fields.rope
    low, high = rope.positive_number("low_freq_factor"), rope.positive_number("high_freq_factor")
    if rope.are_valid("low_freq_factor", "high_freq_factor") and low >= high:
        rope.problem("high_freq_factor", f"is {high}, expected more than low_freq_factor ({low})")
    return RopeConfig(
        "llama3",
        fields.theta,
        factor=rope.positive_number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=fields.original(),
    )


def _dynamic(fields: _RopeFields) -> RopeConfig:
    if fields.head_dim == 2:  # its exponent divides by head_dim - 2
        fields.rope.problem("rope_type", "is 'dynamic', which a head_dim of 2 does not allow")
    factor = fields.rope.number("factor", least=1)
    return RopeConfig("dynamic", fields.theta, factor=factor, original_max_position=fields.max_position)


def _yarn(fields: _RopeFields) -> RopeConfig:
    rope, original = fields.rope, fields.original()
    # Without both, nothing says by how much the context was lengthened.
    told = rope.values.get(_ORIGINAL) is not None
    factor = fields.given_factor(original) if told else rope.positive_number("factor")
    scale, scale_all = (rope.number(name, default=0.0, least=0) for name in ("mscale", "mscale_all_dim"))
    # YaRN §3.4: the temperature of attention, put into cosines and sines.
    recommended = _mscale(factor, scale) / _mscale(factor, scale_all) if scale and scale_all else _mscale(factor)
    fast, slow = _turns(rope, "beta_fast", 32.0), _turns(rope, "beta_slow", 1.0)
    if rope.are_valid("beta_fast", "beta_slow") and fast < slow:
        rope.problem("beta_fast", f"is {fast}, expected at least beta_slow ({slow})")
    if fields.theta <= 1:
        rope.problem("rope_theta", f"is {fields.theta}, expected more than 1 for yarn")
    return RopeConfig(
        "yarn",
        fields.theta,
        factor=factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", default=recommended, least=0),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", default=True),
    )


def _turns(rope: JsonFields, name: str, default: float) -> float:
    """How often a frequency turns in the original context; a zero says nothing, as to transformers."""
    return default if rope.values.get(name) == 0 else rope.positive_number(name, default=default)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(fields: _RopeFields) -> RopeConfig:
    rope, original = fields.rope, fields.original()
    factor = fields.given_factor(original)
    if original == 1 and factor > 1:
        rope.problem(_ORIGINAL, "is 1, expected the context the model was first trained on")
        original = 2
    recommended = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        "longrope",
        fields.theta,
        factor=factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", default=recommended, least=0),
        short_factors=_pair_factors(fields, "short_factor"),
        long_factors=_pair_factors(fields, "long_factor"),
    )


def _pair_factors(fields: _RopeFields, name: str) -> tuple[float, ...]:
    """A positive number for every rotated pair."""
    count = fields.head_dim // 2
    values: Any = fields.rope.values.get(name)
    is_list = isinstance(values, list) and len(values) == count
    if not is_list or not all(map(is_positive, values)):
        found = f"has {len(values)} entries" if isinstance(values, list) and not is_list else f"is {values!r}"
        fields.rope.problem(name, f"{found}, expected {count} positive numbers, one per rotated pair")
        return (1.0,) * count
    return tuple(map(float, values))


_READERS = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}
