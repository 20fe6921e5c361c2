"""What must hold of a network after parsing: TensorRT's importer drops and reinterprets some things without a word.

Known cases (TensorRT-RTX 1.7): `nonpad_kv_seqlen` of Attention is dropped, so is any input nothing reads; `is_causal`
becomes an upper-left mask, where ONNX Runtime's is bottom-right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from dlo_export.checkpoints.dtypes import BY_TENSORRT
from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, kept_projections
from dlo_export.exporter.tensorrt.census import missing_mechanisms, take_census
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.tensorrt.nodes import decoder_layer, input_tensors, network_layers, node_name, output_tensors
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.artefact.engine_record import LayerCensus

CHECKS = ("inputs are used", "attentions are masked", "dtypes are as intended", "routed layers skip")


def check_network(trt: Any, network: Any, request: EngineRequest) -> tuple[LayerCensus, list[str]]:
    """Runs every check.

    Args:
        trt: The backend's module.
        network: As parsed.
        request: What it is to be.

    Returns:
        The census of its layers, and what is wrong, one sentence each.
    """
    census = take_census(trt, network, request.lowering, request.routed_layers)
    return census, [
        *unused_inputs(trt, network),
        *unmasked_attentions(trt, network),
        *wrong_dtypes(trt, network, request.expected_dtypes),
        *missing_mechanisms(census, request.lowering),
        *eager_work(trt, network, request),
    ]


def unused_inputs(trt: Any, network: Any) -> Iterator[str]:
    """Network inputs that no network output depends on."""
    makers: dict[str, Any] = {}
    conditions: dict[str, list[Any]] = defaultdict(list)
    for layer in network_layers(trt, network):
        makers |= {tensor.name: layer for tensor in output_tensors(layer)}
        if layer.type == trt.LayerType.CONDITION:
            conditions[layer.conditional.name] += input_tensors(layer)
    # Backwards from the outputs, through what each layer reads. What decides between the branches of a conditional is
    # read by a layer of its own, which no tensor connects with the conditional's outputs.
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    useful: set[str] = set()
    waiting = outputs
    while waiting:
        tensor = waiting.pop()
        if tensor.name in useful:
            continue
        useful.add(tensor.name)
        layer = makers.get(tensor.name)
        if layer is None:
            continue
        waiting += input_tensors(layer)
        if layer.type == trt.LayerType.CONDITIONAL_OUTPUT:
            waiting += conditions[layer.conditional.name]
    for index in range(network.num_inputs):
        if (name := network.get_input(index).name) not in useful:
            yield f"no output depends on input '{name}': TensorRT's importer dropped what reads it, or nothing does"


def unmasked_attentions(trt: Any, network: Any) -> Iterator[str]:
    """Attentions without a mask, or with the causal one TensorRT makes up."""
    for layer in network_layers(trt, network):
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        attention = layer.attention
        if attention.mask is None:
            yield f"attention '{attention.name}' has no mask: every token would see all of the cache"
        if attention.causal:
            yield f"attention '{attention.name}' is causal, counted from the cache's first slot: give it one full mask"


def wrong_dtypes(trt: Any, network: Any, expected: Mapping[str, str]) -> Iterator[str]:
    """Values whose element type is not the intended one, or that are gone.

    Args:
        trt: The backend's module.
        network: As parsed.
        expected: Element type by name, as in an `EngineRequest`.
    """
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for layer in network_layers(trt, network):
        tensors += output_tensors(layer)
    found = {tensor.name: _word(tensor.dtype) for tensor in tensors}
    interface = {network.get_input(index).name for index in range(network.num_inputs)}
    interface |= {network.get_output(index).name for index in range(network.num_outputs)}
    for name, dtype in expected.items():
        if name not in found:
            yield f"'{name}' is not in the network, expected it in {dtype}"
        elif found[name] != dtype:
            yield f"'{name}' is {found[name]}, expected {dtype}"
    if expected:
        yield from (f"'{name}' is an input or output nobody asked for" for name in sorted(interface - expected.keys()))


def _word(dtype: Any) -> str:
    """ONNX's word for a `trt.DataType`; TensorRT's own where ONNX has none."""
    kind = BY_TENSORRT.get(dtype.name)
    return str(dtype.name) if kind is None else kind.onnx


def eager_work(trt: Any, network: Any, request: EngineRequest) -> Iterator[str]:
    """Matrix multiplications of a routed layer that skipped tokens do not need, and that run for them too.

    In a lowered layer each of them follows a layer of the lowering's `tensorrt_start`, since TensorRT runs lazily only
    what does; a lowering without one leaves no such multiplication.
    """
    lowering = find_lowering(request.lowering, "tensorrt")
    if lowering.make_pass is None:
        return
    blocks = tuple(f".{block}." for block in ROUTED_BLOCKS[request.routing] if block in lowering.blocks)
    kept = tuple(f".{module.path}" for module in kept_projections(request.routing))
    # One walk notes who reads which tensor, where laziness starts, and which multiplications should follow.
    readers: dict[str, list[tuple[int | None, Any]]] = defaultdict(list)
    multiplications: dict[str, tuple[int | None, str]] = {}
    waiting: list[tuple[int | None, Any]] = []
    for layer in network_layers(trt, network):
        name = node_name(trt, layer)
        index = decoder_layer(name)
        for tensor in input_tensors(layer):
            readers[tensor.name].append((index, layer))
        if index in request.routed_layers and layer.type.name == lowering.tensorrt_start:
            waiting.append((index, layer))
        skippable = any(block in name for block in blocks) and not name.endswith(kept)
        if index in request.routed_layers and layer.type.name == "MATRIX_MULTIPLY" and skippable:
            multiplications[layer.name] = (index, name)
    # Forwards from where laziness starts, inside its layer and to the end of the conditional: what is met is lazy.
    lazy: set[str] = set()
    seen: set[tuple[int | None, str]] = set()
    while waiting:
        index, layer = waiting.pop()
        if (index, layer.name) in seen or layer.type.name == "CONDITIONAL_OUTPUT":
            continue
        seen.add((index, layer.name))
        if layer.name in multiplications:
            lazy.add(layer.name)
        for tensor in output_tensors(layer):
            # Casts and the like that the importer adds carry no decoder layer.
            waiting += [(index, reader) for other, reader in readers[tensor.name] if other in (index, None)]
    for layer_name, (index, name) in multiplications.items():
        if layer_name not in lazy:
            yield f"'{name}' of routed decoder layer {index} does not follow what makes it skip: it runs for all tokens"


def make_attentions_decomposable(trt: Any, network: Any) -> int:
    """Allows the builder to take attentions apart where it has no fused kernel for them; returns how many.

    It has none for small or odd head sizes, in fp32, and beside conditionals ("not supported by a dedicated kernel").
    Elsewhere it fuses them all the same. Source: IAttention::setDecomposable.

    Args:
        trt: The backend's module.
        network: As parsed.
    """
    layers = network_layers(trt, network)
    attentions = [layer.attention for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    for attention in attentions:
        attention.decomposable = True
    return len(attentions)
