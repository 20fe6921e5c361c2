"""The interface of one decoder graph, whoever runs it: read from a session or from an artefact's description."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Literal

from dlo_export.checkpoints import interface as names
from dlo_export.checkpoints.dtypes import BOOL, BY_ONNX, FLOATS, INT64, ElementType
from dlo_export.runtimes.errors import ModelInterfaceError
from dlo_export.runtimes.runner import Forcing

# "growing": every step returns a longer cache; "static": a fixed number of slots, each step says which it writes;
# "in_place": the same, written from the first slot on without a gap, past and present in one buffer.
CacheKind = Literal["growing", "static", "in_place"]

_REQUIRED_INPUTS: dict[CacheKind, tuple[str, ...]] = {
    "growing": (names.INPUT_IDS,),
    "static": (names.INPUT_IDS, names.POSITION_IDS, names.WRITE_INDICES, names.KV_LENGTHS),
    "in_place": (names.INPUT_IDS, names.KV_LENGTHS),
}
_STEP_INPUTS: dict[CacheKind, tuple[str, ...]] = {
    "growing": names.TOKEN_INPUTS,
    "static": _REQUIRED_INPUTS["static"],
    "in_place": _REQUIRED_INPUTS["in_place"],
}
_WHAT: dict[CacheKind, str] = {
    "growing": "a decoder with a KV cache",
    "static": "a decoder with a static KV cache",
    "in_place": "a decoder with a KV cache written in place",
}
_HINTS: dict[CacheKind, str] = {
    "growing": "expected input_ids, attention_mask, position_ids, past_key_values.{i}.key|value -> logits, "
    "present.{i}.key|value (optimum's text-generation-with-past)",
    "static": "expected input_ids, position_ids, write_indices, kv_lengths, past_key_values.{i}.key|value of a fixed "
    "length -> logits, present.{i}.key|value (an export with --trt and --trt-cache static)",
    "in_place": "expected input_ids, kv_lengths, past_key_values.{i}.key|value of a fixed length -> logits, "
    "present.{i}.key|value",
}


def cache_kind(inputs: Collection[str]) -> CacheKind:
    """How a graph with inputs of these names keeps its cache."""
    if names.KV_LENGTHS not in inputs:
        return "growing"
    return "static" if names.WRITE_INDICES in inputs else "in_place"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Attributes:
        name: Of the tensor.
        dtype: ONNX's word in lower case, such as "float" or "int64".
        shape: Numbers, and names (or None) for what varies.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @property
    def element_type(self) -> ElementType | None:
        """None for a type this project has no word for."""
        return BY_ONNX.get(self.dtype)


@dataclasses.dataclass(frozen=True)
class DecoderInterface:
    """The names and shapes a runner feeds and fetches.

    Attributes:
        cache: How the cache is kept.
        inputs: By name.
        outputs: By name.
        present_of: State input (`past_key_values.{i}.key|value`, `past_active.{i}`) to the output that continues it.
        num_layers: Decoder layers.
        max_cache: Slots for tokens in a static cache, per sequence; 0 where the cache grows.
        scored_layers: With a `router_scores.{l}` output.
        forced_layers: With a `force_active.{l}` input.
        hidden_layers: With a `hidden.{l}` output, the residual stream behind the layer.
    """

    cache: CacheKind
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    present_of: dict[str, str]
    num_layers: int
    max_cache: int
    scored_layers: tuple[int, ...]
    forced_layers: tuple[int, ...]
    hidden_layers: tuple[int, ...]

    @classmethod
    def of(
        cls, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], name: str, *, cache: CacheKind
    ) -> DecoderInterface:
        """Reads and checks an interface.

        Args:
            inputs: Of the graph or engine.
            outputs: Likewise.
            name: Of the model, for messages.
            cache: What the runner expects.

        Raises:
            ModelInterfaceError: It is not that of a decoder with such a cache, with everything that is wrong.
        """
        given, made = {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}
        past = [key for key in given if names.is_state_input(key)]
        lengths = {given[key].shape[2] for key in past if len(given[key].shape) == 4}
        slots = next(iter(lengths)) if len(lengths) == 1 else None
        interface = cls(
            cache=cache,
            inputs=given,
            outputs=made,
            present_of={key: names.continuation_of(key) for key in past},
            num_layers=len(names.layers_with(given, names.past_name("{i}", "key"))),
            max_cache=slots if cache != "growing" and isinstance(slots, int) else 0,
            scored_layers=names.layers_with(made, names.router_scores_name("{i}")),
            forced_layers=names.layers_with(given, names.force_active_name("{i}")),
            hidden_layers=names.layers_with(made, names.hidden_name("{i}")),
        )
        problems = [*_missing_and_unknown(interface), *_wrong_types(interface), *_wrong_shapes(interface, lengths)]
        if problems:
            raise ModelInterfaceError(f"{name}: is not {_WHAT[cache]}: {'; '.join(problems)}", hint=_HINTS[cache])
        return interface

    @property
    def step_inputs(self) -> tuple[str, ...]:
        """Inputs that say which tokens come, those the graph has: neither cache nor decisions."""
        return tuple(key for key in _STEP_INPUTS[self.cache] if key in self.inputs)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Layers whose routing shows."""
        return tuple(sorted({*self.scored_layers, *self.forced_layers}))

    @property
    def forcing(self) -> Forcing:
        """Whether steps bring decisions: a graph with inputs for them decides nothing itself."""
        return "required" if self.forced_layers else "impossible"

    @property
    def last_logits(self) -> bool:
        """Whether `logits` holds the last real token of a step only, [batch, 1, vocab]."""
        return self.outputs[names.LOGITS].shape[1:2] == (1,)

    def element_type(self, name: str) -> ElementType:
        """Of an input or output; that there is a word for it was checked."""
        kind = (self.inputs.get(name) or self.outputs[name]).element_type
        assert kind is not None, f"{name} was checked"
        return kind

    def observed(self, *, hidden_states: bool) -> tuple[str, ...]:
        """Outputs to fetch beside the cache: logits, scores and, on request, the residual streams."""
        return (
            names.LOGITS,
            *(names.router_scores_name(layer) for layer in self.scored_layers),
            *(names.hidden_name(layer) for layer in (self.hidden_layers if hidden_states else ())),
        )

    def step_shape(self, output: str, batch: int, sequence: int) -> tuple[int, ...] | None:
        """Shape of an observed output in a step of unpadded sequences; None where the graph does not say all of it.

        Args:
            output: One of `observed`.
            batch: Sequences.
            sequence: Tokens each.
        """
        said = self.outputs[output].shape
        step = (batch, sequence)
        sizes = [size if isinstance(size, int) else step[axis] if axis < 2 else None for axis, size in enumerate(said)]
        return tuple(size for size in sizes if size is not None) if said and None not in sizes else None

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Shape of every state input before the first token: what grows has size 0.

        Raises:
            ModelInterfaceError: The graph is of another, fixed batch size.
        """
        shapes = {}
        for key in self.present_of:
            shape = self.inputs[key].shape
            if isinstance(shape[0], int) and shape[0] != batch:
                raise ModelInterfaceError(
                    f"input {key} has a fixed batch of {shape[0]}, expected {batch}",
                    hint=f"feed batches of {shape[0]}, or export the graph with a batch that varies",
                )
            shapes[key] = (batch, *(size if isinstance(size, int) else 0 for size in shape[1:]))
        return shapes

    def state_bytes(self, batch: int) -> dict[str, int]:
        """Bytes of every state input before the first token.

        Raises:
            ModelInterfaceError: As `state_shapes`.
        """
        shapes = self.state_shapes(batch)
        return {key: math.prod(shape) * self.element_type(key).itemsize for key, shape in shapes.items()}


def _missing_and_unknown(interface: DecoderInterface) -> Iterator[str]:
    inputs, outputs = interface.inputs, interface.outputs
    layers = range(interface.num_layers)
    cache = {names.past_name(layer, part) for layer in layers for part in names.CACHE_PARTS}
    if not cache:
        yield f"inputs {names.past_name('{i}', 'key')} are missing"
    if missing := sorted({*_REQUIRED_INPUTS[interface.cache], *cache} - inputs.keys()):
        yield f"inputs {missing} are missing"
    continued = {*interface.present_of.values(), *(names.continuation_of(key) for key in cache)}
    if missing := sorted({names.LOGITS, *continued} - outputs.keys()):
        yield f"outputs {missing} are missing"
    forced = {names.force_active_name(layer) for layer in interface.forced_layers}
    if unknown := sorted(inputs.keys() - {*_STEP_INPUTS[interface.cache], *interface.present_of} - forced):
        yield f"inputs {unknown} are unknown"
    # Other people's graphs may give out more than we ask for; an engine needs memory for every output.
    shown = {names.LOGITS, *continued, *interface.observed(hidden_states=True)}
    if interface.cache != "growing" and (unknown := sorted(outputs.keys() - shown)):
        yield f"outputs {unknown} are unknown"


def _wrong_types(interface: DecoderInterface) -> Iterator[str]:
    states = (*interface.present_of, *interface.present_of.values())
    masks = [key for key in states if _is_active_mask(key)]
    floats = [key for key in states if not _is_active_mask(key)]
    # Over a static cache, who was active is one more cache, of the others' type.
    active = (BOOL,) if interface.cache == "growing" else FLOATS
    expected: dict[str, tuple[ElementType, ...]] = {
        **dict.fromkeys(interface.step_inputs, (INT64,)),
        **dict.fromkeys((names.force_active_name(layer) for layer in interface.forced_layers), (BOOL,)),
        **dict.fromkeys(masks, active),
        **dict.fromkeys((*interface.observed(hidden_states=True), *floats), FLOATS),
    }
    for key, types in expected.items():
        spec = interface.inputs.get(key) or interface.outputs.get(key)
        if spec is not None and spec.element_type not in types:
            yield f"{key} is {spec.dtype}, expected {' or '.join(kind.onnx for kind in types)}"


def _wrong_shapes(interface: DecoderInterface, lengths: set[int | str | None]) -> Iterator[str]:
    static = interface.cache != "growing"
    if static and lengths and not interface.max_cache:
        yield f"the cache's lengths are {sorted(map(str, lengths))}, expected one number for all layers"
    logits = interface.outputs.get(names.LOGITS)
    if static and logits is not None and len(logits.shape) != 3:
        yield f"{names.LOGITS} has shape {list(logits.shape)}, expected [batch, sequence, vocab]"
    for key in sorted(key for key in interface.present_of if not _is_active_mask(key)):
        shape = interface.inputs[key].shape
        if len(shape) != 4 or not all(isinstance(size, int) for size in (shape[1:] if static else shape[1::2])):
            what = "numbers for kv_heads, length and head_dim" if static else "numbers for kv_heads and head_dim"
            yield f"input {key} has shape {list(shape)}, expected {what}"
            break  # the others will be alike
    for key in sorted(key for key in interface.present_of if _is_active_mask(key)):
        shape = interface.inputs[key].shape
        if static and (len(shape) != 4 or shape[1:] != (1, interface.max_cache, 1)):
            yield f"input {key} has shape {list(shape)}, expected [batch, 1, {interface.max_cache}, 1]"
        if not static and len(shape) != 2:
            yield f"input {key} has shape {list(shape)}, expected [batch, past]"


def _is_active_mask(state: str) -> bool:
    return names.parse_past(state) is None and names.parse_present(state) is None
