"""The inputs and outputs of a decoder with a static KV cache: what a TensorRT graph has, whoever runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from dlo_export.runtimes.errors import ModelInterfaceError
from dlo_export.runtimes.onnxruntime.decoder_interface import layers_named, present_name

TOKEN_INPUTS = ("input_ids", "position_ids")
CACHE_INPUTS = ("write_indices", "kv_lengths")
FLOATING = ("float", "float16", "bfloat16")
HINT = (
    "expected input_ids, position_ids, write_indices, kv_lengths, past_key_values.{i}.key|value of a fixed length -> "
    "logits, present.{i}.key|value (an export with --trt and --trt-cache static)"
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output.

    Attributes:
        name: Of the tensor.
        dtype: "float", "float16", "bfloat16", "int64" or "bool": ONNX's words, lower case.
        shape: Numbers, and names (or None) for what varies.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclasses.dataclass(frozen=True)
class StaticCacheInterface:
    """The names and shapes a runner feeds and fetches.

    Attributes:
        inputs: By name.
        outputs: By name.
        present_of: `past_key_values.{i}.key|value` to the output that continues it.
        num_layers: Decoder layers.
        max_cache: Slots for tokens in the cache, per sequence.
        scored_layers: With a `router_scores.{l}` output.
        forced_layers: With a `force_active.{l}` input.
        hidden_layers: With a `hidden.{l}` output, the residual stream behind the layer.
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    present_of: dict[str, str]
    num_layers: int
    max_cache: int
    scored_layers: tuple[int, ...]
    forced_layers: tuple[int, ...]
    hidden_layers: tuple[int, ...]

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Layers whose routing shows."""
        return tuple(sorted({*self.scored_layers, *self.forced_layers}))

    @property
    def last_logits(self) -> bool:
        """Whether `logits` holds the last real token of a step only, [batch, 1, vocab]."""
        return self.outputs["logits"].shape[1] == 1

    @property
    def observed(self) -> tuple[str, ...]:
        """Outputs that are not the cache."""
        cache = set(self.present_of.values())
        return tuple(name for name in self.outputs if name not in cache)

    @classmethod
    def of(cls, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], name: str) -> StaticCacheInterface:
        """Reads and checks an interface.

        Args:
            inputs: Of the graph or engine.
            outputs: Likewise.
            name: Of the model, for messages.

        Raises:
            ModelInterfaceError: It is not that of a decoder with a static cache, with everything that is wrong.
        """
        given, made = {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}
        past = [key for key in given if key.startswith("past_")]
        lengths = {spec.shape[2] for key, spec in given.items() if key in past and len(spec.shape) == 4}
        length = next(iter(lengths)) if len(lengths) == 1 else None
        interface = cls(
            inputs=given,
            outputs=made,
            present_of={key: present_name(key) for key in past},
            num_layers=len(layers_named(past, r"past_key_values\.(\d+)\.key")),
            max_cache=length if isinstance(length, int) else 0,
            scored_layers=layers_named(made, r"router_scores\.(\d+)"),
            forced_layers=layers_named(given, r"force_active\.(\d+)"),
            hidden_layers=layers_named(made, r"hidden\.(\d+)"),
        )
        if problems := [*_problems(interface, lengths)]:
            raise ModelInterfaceError(f"{name}: is no decoder with a static KV cache: {'; '.join(problems)}", hint=HINT)
        return interface


def _problems(interface: StaticCacheInterface, lengths: set[int | str | None]) -> Iterator[str]:
    inputs, outputs = interface.inputs, interface.outputs
    cache = {f"past_key_values.{i}.{part}" for i in range(interface.num_layers) for part in ("key", "value")}
    needed = {*TOKEN_INPUTS, *CACHE_INPUTS, *cache}
    if not cache:
        yield "inputs past_key_values.{i}.key are missing"
    if missing := sorted(needed - inputs.keys()):
        yield f"inputs {missing} are missing"
    if missing := sorted({"logits", *(present_name(key) for key in cache)} - outputs.keys()):
        yield f"outputs {missing} are missing"
    forced = {f"force_active.{layer}" for layer in interface.forced_layers}
    if unknown := sorted(inputs.keys() - needed - forced):
        yield f"inputs {unknown} are unknown"
    shown = {f"router_scores.{layer}" for layer in interface.scored_layers}
    shown |= {f"hidden.{layer}" for layer in interface.hidden_layers}
    if unknown := sorted(outputs.keys() - {"logits", *interface.present_of.values()} - shown):
        yield f"outputs {unknown} are unknown"
    if cache and not (len(lengths) == 1 and interface.max_cache):
        yield f"the cache's lengths are {sorted(map(str, lengths))}, expected one number for all layers"
    if "logits" in outputs and len(outputs["logits"].shape) != 3:
        yield f"logits has shape {list(outputs['logits'].shape)}, expected [batch, sequence, vocab]"
    expected: dict[str, tuple[str, ...]] = dict.fromkeys((*TOKEN_INPUTS, *CACHE_INPUTS), ("int64",))
    expected |= dict.fromkeys(forced, ("bool",))
    expected |= dict.fromkeys(("logits", *shown, *interface.present_of, *interface.present_of.values()), FLOATING)
    for key, types in expected.items():
        spec = inputs.get(key) or outputs.get(key)
        if spec is not None and spec.dtype not in types:
            yield f"{key} is {spec.dtype}, expected {' or '.join(types)}"
    for key in sorted(cache & inputs.keys()):
        shape = inputs[key].shape
        if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]):
            yield f"{key} has shape {list(shape)}, expected [batch, number, number, number]"
            break  # the others will be alike
