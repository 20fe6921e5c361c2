"""Rotary position embedding: its frequencies, and how config.json describes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dlo_export.checkpoints.files.json_fields import JsonFields

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over the whole head.

    Attributes:
        kind: How the frequencies are scaled for contexts longer than trained on.
        theta: Base of the geometric sequence of wavelengths.
        factor: Divisor of the frequencies (linear: of all, llama3: of the low ones).
        low_freq_factor: llama3 only: wavelengths above original_max_position / low_freq_factor are fully scaled.
        high_freq_factor: llama3 only: wavelengths below original_max_position / high_freq_factor are left alone.
        original_max_position: llama3 only: context length before scaling, in tokens.
    """

    kind: Literal["default", "linear", "llama3"]
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0

    def parameters(self) -> dict[str, Any]:
        """The same as `rope_parameters` of transformers 5."""
        values: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            values["factor"] = self.factor
        if self.kind == "llama3":
            values |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_max_position,
            }
        return values

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per token of each rotated pair, float32 [head_dim / 2], as transformers computes them.

        Source: RoFormer (arXiv 2104.09864) §3.2; the llama3 rule is the one published with Llama 3.1.
        """
        # Rounded to float32 after each step, like the PyTorch reference: a last-bit difference grows with the position.
        # NumPy's float32 power is often off by one bit, PyTorch's hardly ever, hence the detour over float64.
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        periods = np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        frequencies = np.float32(1.0) / periods
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3_frequencies(frequencies)
        return frequencies

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


def rope_of_fields(fields: JsonFields, max_position_embeddings: int) -> RopeConfig:
    """Reads transformers 5's `rope_parameters`, or 4's `rope_theta` and `rope_scaling`.

    Args:
        fields: Of config.json; problems are noted there.
        max_position_embeddings: Where llama3 does not say what context it was scaled from.
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
    if kind == "default":
        return RopeConfig("default", theta)
    if kind == "linear":
        return RopeConfig("linear", theta, factor=rope.positive_number("factor"))
    if kind == "llama3":
        low, high = rope.positive_number("low_freq_factor"), rope.positive_number("high_freq_factor")
        if rope.are_valid("low_freq_factor", "high_freq_factor") and low >= high:
            rope.problem("high_freq_factor", f"is {high}, expected more than low_freq_factor ({low})")
        key = "original_max_position_embeddings"
        # transformers lets a top-level value overrule the nested one.
        holder = fields if values.get(key) is not None else rope
        return RopeConfig(
            "llama3",
            theta,
            factor=rope.positive_number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=holder.integer(key, default=max_position_embeddings),
        )
    rope.problem("rope_type", f"is {kind!r}, expected one of {', '.join(ROPE_KINDS)}")
    return RopeConfig("default", theta)
