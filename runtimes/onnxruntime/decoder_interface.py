"""What a decoder graph's inputs and outputs are, read from its session by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dlo_export.runtimes.errors import ModelInterfaceError

_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_ELEMENT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class _Argument(Protocol):
    name: str
    shape: list[int | str | None]
    type: str


class _Session(Protocol):
    def get_inputs(self) -> Sequence[_Argument]: ...

    def get_outputs(self) -> Sequence[_Argument]: ...


@dataclasses.dataclass(frozen=True)
class DecoderInterface:
    """The names a runner feeds and fetches.

    Attributes:
        token_inputs: Those of input_ids, attention_mask and position_ids that the graph has.
        cache_inputs: State inputs, `past_key_values.{i}.key|value` and `past_active.{i}`: shape and element type.
        present_of: State input to the output that continues it.
        num_layers: Decoder layers.
        scored_layers: With a `router_scores.{l}` output.
        forced_layers: With a `force_active.{l}` input.
        hidden_layers: With a `hidden.{l}` output, the residual stream behind the layer.
    """

    token_inputs: tuple[str, ...]
    cache_inputs: dict[str, tuple[tuple[int | str | None, ...], Any]]
    present_of: dict[str, str]
    num_layers: int
    scored_layers: tuple[int, ...]
    forced_layers: tuple[int, ...]
    hidden_layers: tuple[int, ...]

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Layers whose routing shows."""
        return tuple(sorted({*self.scored_layers, *self.forced_layers}))

    @classmethod
    def from_session(cls, session: _Session, name: str) -> DecoderInterface:
        """Reads and checks a session's interface.

        Args:
            session: Loaded.
            name: Of the model, for messages.

        Raises:
            ModelInterfaceError: It is not a decoder's, with everything that is wrong.
        """
        inputs = {argument.name: argument for argument in session.get_inputs()}
        outputs = {argument.name for argument in session.get_outputs()}
        forced = layers_named(inputs, r"force_active\.(\d+)")
        past = {key: argument for key, argument in inputs.items() if key.startswith("past")}
        interface = cls(
            token_inputs=tuple(key for key in _TOKEN_INPUTS if key in inputs),
            cache_inputs={key: (tuple(a.shape), _ELEMENT_TYPES.get(a.type)) for key, a in past.items()},
            present_of={key: present_name(key) for key in past},
            num_layers=len(layers_named(past, r"past_key_values\.(\d+)\.key")),
            scored_layers=layers_named(outputs, r"router_scores\.(\d+)"),
            forced_layers=forced,
            hidden_layers=layers_named(outputs, r"hidden\.(\d+)"),
        )
        if problems := [*_problems(interface, inputs, outputs)]:
            raise ModelInterfaceError(
                f"{name}: is not a decoder with a KV cache: {'; '.join(problems)}",
                hint="expected input_ids, attention_mask, position_ids, past_key_values.{i}.key|value -> logits, "
                "present.{i}.key|value (optimum's text-generation-with-past)",
            )
        return interface

    def empty_cache(self, batch: int) -> dict[str, tuple[list[int], Any]]:
        """Shape and element type of every state input before the first token.

        Raises:
            ModelInterfaceError: The graph is of another, fixed batch size.
        """
        cache = {}
        for name, (shape, element_type) in self.cache_inputs.items():
            if isinstance(shape[0], int) and shape[0] != batch:
                raise ModelInterfaceError(f"input {name} has a fixed batch of {shape[0]}, expected {batch}")
            cache[name] = ([batch, *(size if isinstance(size, int) else 0 for size in shape[1:])], element_type)
        return cache

    def observed(self, hidden_states: bool) -> Iterator[str]:
        """Outputs to fetch beside the present: logits, scores and, on request, the residual streams."""
        yield "logits"
        yield from (f"router_scores.{layer}" for layer in self.scored_layers)
        if hidden_states:
            yield from (f"hidden.{layer}" for layer in self.hidden_layers)


def present_name(past: str) -> str:
    """The output that continues a state input."""
    if past.startswith("past_key_values."):
        return past.replace("past_key_values.", "present.", 1)
    return past.replace("past_", "present_", 1)


def layers_named(names: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Layers whose number a pattern's group finds in names, ascending."""
    return tuple(sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name))))


def _problems(interface: DecoderInterface, inputs: dict[str, _Argument], outputs: set[str]) -> Iterator[str]:
    if "input_ids" not in inputs:
        yield "input input_ids is missing"
    if "logits" not in outputs:
        yield "output logits is missing"
    if interface.num_layers == 0:
        yield "inputs past_key_values.{i}.key are missing"
    expected = {f"past_key_values.{i}.{part}" for i in range(interface.num_layers) for part in ("key", "value")}
    if missing := sorted(expected - inputs.keys()):
        yield f"inputs {missing} are missing"
    if missing := sorted(set(interface.present_of.values()) - outputs):
        yield f"outputs {missing} are missing"
    known = {*_TOKEN_INPUTS, *interface.cache_inputs, *(f"force_active.{layer}" for layer in interface.forced_layers)}
    if unknown := sorted(inputs.keys() - known):
        yield f"inputs {unknown} are unknown"
    for name in ("input_ids", "attention_mask", "position_ids"):
        if name in inputs and inputs[name].type != "tensor(int64)":
            yield f"input {name} is {inputs[name].type}, expected tensor(int64)"
    for name, (shape, _) in interface.cache_inputs.items():
        if len(shape) == 4 and not (isinstance(shape[1], int) and isinstance(shape[3], int)):
            yield f"input {name} has shape {list(shape)}, expected numbers for kv_heads and head_dim"
            break  # the others will be alike
    if types := sorted({inputs[name].type for name, (_, kind) in interface.cache_inputs.items() if kind is None}):
        yield f"the cache is of {types}, expected one of {sorted(_ELEMENT_TYPES)}"
