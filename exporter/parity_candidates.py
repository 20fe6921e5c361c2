"""Graphs in ONNX Runtime as something that parity compares: an artefact's, and the fp32 twins of TensorRT's."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_runner import exposed_model, held_tokens, runner_for, serialized
from dlo_export.exporter.exact_products import with_exact_products
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.target_graphs import build_captured_model, build_model
from dlo_export.exporter.tensorrt.twin import tensorrt_twin
from dlo_export.exporter.weight_file import external_tensors, save_weights, stored_bytes, take_weights
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.static_cache_runner import StaticCacheRunner
from dlo_export.runtimes.parity.compare import Candidate
from dlo_export.runtimes.runner import Runner


def graph_candidate(
    lowering: str,
    graph: ir.Model,
    folder: Path,
    *,
    file: Path | None = None,
    routed: bool,
    plugin_library: Path | None = None,
    provider: Provider = CPU,
    exact_products: bool = False,
) -> Candidate:
    """A graph in ONNX Runtime as something to compare.

    Args:
        lowering: Of the graph, for reports.
        graph: As it is released; copies of it show its routers and streams.
        folder: Of its weights.
        file: That it is read from; None where there is none.
        routed: Whether it has routers.
        plugin_library: libdlo_ort.so; loaded where it has dlo operators.
        provider: What runs it.
        exact_products: Run it, and from memory, with products that round nothing to 8 bits.
    """
    label = "dense" if lowering == "none" else lowering
    library = plugin_library if plugin_operators(graph) else None
    if exact_products:
        graph, file = with_exact_products(graph), None
    # PyTorch runs in the same process: spinning threads would take its cores.
    open_runner = functools.partial(
        runner_for(value.name or "" for value in graph.graph.inputs),
        name=label,
        allow_spinning=False,
        plugin_library=library,
        provider=provider,
        exact_products=exact_products,
    )

    def opened(*, force: bool, streams: bool = False) -> Runner:
        return open_runner(exposed_model(graph, force=force, streams=streams), weights_folder=folder)

    return Candidate(
        label,
        functools.partial(opened, force=False) if file is None else functools.partial(open_runner, file),
        functools.partial(opened, force=True) if routed else None,
        functools.partial(opened, force=routed, streams=True),
        functools.partial(opened, force=False) if routed else None,
    )


def masked_graph(
    source: ExportSource,
    folder: Path,
    released: ir.Model,
    description: ArtefactDescription,
    *,
    equal_weights: bool = False,
) -> ir.Model:
    """The source's graph before its lowering, on the artefact's weights; all around routed blocks is as in that.

    Args:
        source: What the artefact was made from.
        folder: The artefact, for messages.
        released: Its graph.
        description: Its dlo_artifact.json.
        equal_weights: Compare its weights with the source's, bit for bit: where both sides of parity run on the
            artefact's, nothing else does.

    Raises:
        InputError: The artefact has other weights than the source's graph: of other names or sizes, or not equal.
    """
    dtype, target = graph_dtype(description.dtype), PROVIDER_TARGETS[description.provider]
    slots, stored = held_tokens(description), external_tensors(released.graph)
    if slots is not None and description.provider != "cpu":
        model = build_captured_model(source, "masked", slots, dtype, target)
    else:
        model = build_model(source, "masked", dtype, target, static_cache=slots, compared_with=description.lowering)
    different = _unequal(model, stored) if equal_weights else set()
    if different := different or take_weights(model, stored):
        raise InputError(
            f"{folder / MODEL_NAME}: its weights are not those of an export of this source: "
            f"{', '.join(sorted(different)[:5])}",
            hint="give the model (and adapter) the artefact was made from, and the version that made it",
        )
    return model


def _unequal(model: ir.Model, stored: Mapping[str, ir.ExternalTensor]) -> set[str]:
    """Names of the stored weights that a model has with other values."""
    own = {name: model.graph.initializers[name].const_value for name in stored.keys() & model.graph.initializers.keys()}
    return {name for name, tensor in own.items() if tensor is None or tensor.tobytes() != stored_bytes(stored[name])}


def twin_candidates(
    source: ExportSource,
    folder: Path,
    description: ArtefactDescription,
    released: ir.Model,
    tensorrt: Iterable[TensorRtOptions],
    scratch: Path,
) -> list[Candidate]:
    """The fp32 twins of TensorRT's graphs: on the artefact's weights, or, for somebody's graph, on a copy of them."""
    theirs, candidates = description.source.kind == "onnx", []
    for number, options in enumerate(tensorrt):
        twin = tensorrt_twin(source, options, None if theirs else released)
        if theirs:
            save_weights(twin, scratch / f"twin_{number}")
        weights = scratch if theirs else folder
        candidates.append(_twin_candidate(twin, options, weights, routed=source.routing is not None))
    return candidates


def _twin_candidate(twin: ir.Model, options: TensorRtOptions, folder: Path, *, routed: bool) -> Candidate:
    label = f"trt {options.lowering}" + (", growing" if options.cache == "growing" else "")

    def opened(*, force: bool, streams: bool = False, shown: bool = False) -> OnnxRuntimeRunner | StaticCacheRunner:
        runner = StaticCacheRunner if options.cache == "static" else OnnxRuntimeRunner
        # Only parity builds show their routers.
        inside = force or streams or shown
        model = exposed_model(twin, force=force, streams=streams) if inside else serialized(twin)
        return runner(model, weights_folder=folder, name=label, allow_spinning=False)

    return Candidate(
        label,
        functools.partial(opened, force=False),
        functools.partial(opened, force=True) if routed else None,
        functools.partial(opened, force=routed, streams=True),
        functools.partial(opened, force=False, shown=True) if routed else None,
    )
