"""The parity ladder of an artefact: PyTorch oracle, masked graph, lowered graph.

Where there is no PyTorch model of somebody's graph, its own masked form is the oracle; where it was deepened only, and
by layers that add nothing, the graph as it was. Its engines' twins are then compared with the graph itself.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.llama_layer import EMBEDDING
from dlo_export.exporter.artefact_runner import cache_slots, exposed_model, runner_for
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.pipeline import TensorRtOptions, build_captured_model, build_model
from dlo_export.exporter.provider_gaps import named_operators
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.exporter.sources.reduced_source import ReducedSource, without_layers
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.tensorrt.engine_request import plugin_operators
from dlo_export.exporter.tensorrt.twin import tensorrt_twin
from dlo_export.exporter.weight_file import external_tensors, save_weights, take_weights
from dlo_export.graph_passes.cleanup.state_cache_sizes import StateCacheSizesPass
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.find.padding import takes_left_padding
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.graph_passes.naming import free_interface_names
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.weights.matmul_nbits import EIGHT_BIT_ACTIVATIONS
from dlo_export.plugins.ort_registration import no_library
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.static_cache_runner import StaticCacheRunner
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.compare import Candidate, compare
from dlo_export.runtimes.parity.fewer_layers import FewerLayersRunner
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.two_builds import TwoBuildsRunner
from dlo_export.runtimes.runner import Runner

_SEED = 0
_GREEDY_PROMPTS = (24, 15)  # tokens: of unequal length, so that one is padded
_GREEDY_TOKENS = 32
MOST_TOKENS = _GREEDY_PROMPTS[0] + _GREEDY_TOKENS
"""Slots of a KV cache that parity's longest case fills; it makes do with fewer."""


def check_parity(
    source: ExportSource,
    folder: Path,
    description: ArtefactDescription,
    tensorrt: Iterable[TensorRtOptions] = (),
    plugin_library: Path | None = None,
    *,
    provider: Provider = CPU,
    device: str = "cpu",
) -> ParityReport:
    """Compares an artefact, and the fp32 twins of its TensorRT graphs, with the PyTorch model of its source.

    Every rung runs from the artefact's own weights. Where logits differ, the case is repeated with the residual streams
    exposed, so that the report names the first layer that diverges.

    Args:
        source: What the artefact was made from.
        folder: The artefact.
        description: Its dlo_artifact.json.
        tensorrt: Options of its TensorRT graphs.
        plugin_library: libdlo_ort.so, for an artefact with dlo operators; without it there is nothing to run.
        provider: What runs the artefact; the twins of TensorRT graphs are the CPU's.
        device: Of the reference, as `--device` names it.

    Raises:
        BackendUnavailableError: The provider does not start here.
        MachineError: There is no such device.
        InputError: The artefact was made from another source, or by another version, or the library cannot be used.
    """
    if not source.removed_layers:  # of an artefact without some, the source as it was opened has all
        source = without_layers(source, description.source.removed_layers)
    released = load_graph(folder / MODEL_NAME)
    tensorrt = tuple(dict.fromkeys(tensorrt))
    reason = why_not_run(source, description, released, plugin_library, provider, engines=bool(tensorrt))
    if reason is not None:
        return ParityReport.not_run(reason)
    has_model, tensors = source.base.why_not("parity") is None, source.tensors()
    rungs = {description.lowering: released}
    # An artefact made from a graph, compared with a checkpoint: its weights lie as they did in that graph.
    from_graph = description.source.kind == "onnx" and source.kind != "onnx"
    target = PROVIDER_TARGETS[description.provider]
    if has_model and not from_graph and find_lowering(description.lowering, target).make_pass is not None:
        rungs = {"masked": _masked_graph(source, folder, released, description), **rungs}
    candidates = [
        graph_candidate(
            name,
            graph,
            folder,
            # What is shipped is what runs, byte for byte.
            file=folder / MODEL_NAME if graph is released else None,
            routed=source.routing is not None,
            plugin_library=plugin_library,
            provider=provider,
        )
        for name, graph in rungs.items()
    ]
    if not has_model and source.routing is None:
        # The graph as it was has fewer layers: there is no telling at which one the streams part.
        candidates = [dataclasses.replace(candidate, open_streams=None) for candidate in candidates]
    slots = [cache_slots(released.graph) or MOST_TOKENS, *(options.max_cache for options in tensorrt)]
    longest = min(MOST_TOKENS, *slots)
    routed, vocab_size = source.routing is not None, tensors[EMBEDDING].shape[0]
    padded = takes_left_padding(released.graph)
    rng = np.random.default_rng(_SEED)
    greedy_prompts = _GREEDY_PROMPTS if padded else (_GREEDY_PROMPTS[0],) * 2
    prompts = [max(1, tokens * longest // MOST_TOKENS) for tokens in greedy_prompts]
    comparison = functools.partial(
        compare,
        cases=parity_cases(vocab_size, routed=routed, seed=_SEED, longest=longest, padded=padded),
        dtype=description.dtype,
        greedy_prompts=[rng.integers(0, vocab_size, tokens).tolist() for tokens in prompts],
        greedy_tokens=max(1, longest - prompts[0]),
        steps_matter=source.base.config is not None and source.base.config.rope.depends_on_length,
    )
    with tempfile.TemporaryDirectory(prefix="dlo-export-") as scratch:
        twins = _twins(source, folder, description, released, tensorrt, Path(scratch))
        if has_model:
            opened = functools.partial(_pytorch_reference, source, device=device)
            # Another precision, which tells rounding from faults: more of it, or the artefact's own.
            other = "float64" if description.dtype == "fp32" else BY_OPTION[description.dtype].name
            another = functools.partial(opened, name=f"PyTorch in {other}", dtype=other)
            with opened() as reference:
                return comparison(reference, [*candidates, *twins], open_other=another)
        # What a graph with quantised weights computes depends on its kernels: what it is lowered to runs on the same
        # ones, engines on weights that were dequantised.
        reports = []
        if _why_no_oracle(source, description) is None:
            with _own_reference(source, folder, released, description, provider) as reference:
                # The same kernels, which may round a token of a prompt otherwise than one that comes by itself.
                reports.append(comparison(reference, candidates, steps_matter=True))
        if twins:
            with _dequantising_reference(source, folder, released, description, provider) as reference:
                reports.append(comparison(reference, twins))
        return ParityReport.joined(reports)


def _twins(
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


def _pytorch_reference(source: ExportSource, **options: Any) -> Runner:
    """The PyTorch model of a source, all its layers included: those too that were removed as passing everything on."""
    # Imported here: torch takes seconds, and an export without parity does not need it.
    from dlo_export.runtimes.torch.reference import open_reference  # noqa: PLC0415

    if not isinstance(source, ReducedSource):
        return open_reference(source.config_json(), source.tensors(), **options)
    whole = source.whole
    return FewerLayersRunner(open_reference(whole.config_json(), whole.tensors(), **options), source.kept)


def _own_reference(
    source: ExportSource, folder: Path, released: ir.Model, description: ArtefactDescription, provider: Provider
) -> Runner:
    """What a graph without a PyTorch model is compared with, on the same provider."""
    opened = functools.partial(OnnxRuntimeRunner, allow_spinning=False, provider=provider)
    if source.routing is None:
        return opened(as_it_was(source), weights_folder=source.base.path.parent, name="the graph as it was")
    name = "its own masked form"
    masked = _masked_graph(source, folder, released, description)
    free, forced = (
        opened(exposed_model(masked, force=force, streams=True), weights_folder=folder, name=name)
        for force in (False, True)
    )
    return TwoBuildsRunner(free, forced, name=name, thresholds=description.router_thresholds)


def _dequantising_reference(
    source: ExportSource, folder: Path, released: ir.Model, description: ArtefactDescription, provider: Provider
) -> Runner:
    """A graph with quantised weights, not lowered, that multiplies by the numbers its codes stand for.

    Its own kernels may round the other factor to 8 bits besides, which `accuracy_level` asks them for; engines do not.
    """
    unlowered = released
    if source.routing is not None:
        unlowered = _masked_graph(source, folder, released, description)
    exact = ir.from_proto(ir.to_proto(unlowered))
    for node in exact.graph.all_nodes():
        if is_op(node, "MatMulNBits", domain=MICROSOFT):
            node.attributes.pop("accuracy_level", None)
    name, routed = "its weights dequantised", source.routing is not None
    runners = [
        OnnxRuntimeRunner(
            exposed_model(exact, force=force, streams=True),
            weights_folder=folder,
            name=name,
            allow_spinning=False,
            provider=provider,
            exact_products=True,
        )
        for force in ((False, True) if routed else (False,))
    ]
    return TwoBuildsRunner(*runners, name=name, thresholds=description.router_thresholds) if routed else runners[0]


def as_it_was(source: ExportSource) -> bytes:
    """Somebody's file, its cache's sizes said, and its logits called so."""
    model, sized = load_graph(source.base.path), source.plain_model(ir.DataType.FLOAT)
    StateCacheSizesPass()(sized)
    free_interface_names(model.graph)
    for value, named in zip(model.graph.outputs, sized.graph.outputs, strict=True):
        value.name = named.name
    shapes = {value.name: value.shape for value in (*sized.graph.inputs, *sized.graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = shapes.get(value.name, value.shape)
    return bytes(ir.to_proto(model).SerializeToString())


def _why_no_oracle(source: ExportSource, description: ArtefactDescription) -> str | None:
    """Why a graph cannot be compared with itself either."""
    if source.routing is None:
        new = {layer.position for layer in source.injected_layers}
        return None if new.issubset(source.identity_layers()) else "its new layers change what it computes"
    masked = find_lowering(description.lowering, PROVIDER_TARGETS[description.provider]).make_pass is None
    return "the masked graph would be compared with itself" if masked else None


def why_not_run(
    source: ExportSource,
    description: ArtefactDescription,
    released: ir.Model,
    plugin_library: Path | None,
    provider: Provider,
    *,
    engines: bool,
) -> str | None:
    """Why there is nothing to compare: no PyTorch model, or a graph that the provider has no kernels for.

    Graphs of engines are compared with the graph they were made from, where there is nothing else.
    """
    if not engines and (refusal := source.base.why_not("parity")) is not None:
        no_oracle = _why_no_oracle(source, description)
        if no_oracle is not None:
            return f"{refusal.reason}, and {no_oracle}"
    if description.plugin_operators and plugin_library is None:
        return no_library(description.plugin_operators).message
    return provider.why_not_run(BY_OPTION[description.dtype], named_operators(released))


def doubt_about_kernels(released: ir.Model, description: ArtefactDescription, provider: Provider) -> str | None:
    """What a failed parity may come from other than the graph, and what tells the two apart; None: nothing known.

    ONNX Runtime 1.32 on a CPU: a float16 node between two that it has in float32 alone is computed in float32, its
    scales cast in front of it. In a branch nothing folds that Cast, and MatMulNBits packs the codes for products of 8
    bits without the scales that it sees as computed: what it gives then is off by as much as it is large.
    """
    if provider.device != CPU.device or description.dtype != "fp16":
        return None
    products = (node for node in released.graph.all_nodes() if is_op(node, "MatMulNBits", domain=MICROSOFT))
    if all(node.attributes.get_int("accuracy_level", 0) != EIGHT_BIT_ACTIVATIONS for node in products):
        return None
    return (
        "ONNX Runtime's CPU provider may compute float16 MatMulNBits of accuracy_level 4 wrongly in branches, and "
        "rounds to 8 bits elsewhere: whether it is that, a graph built with accuracy_level 0 shows"
    )


def graph_candidate(
    lowering: str,
    graph: ir.Model,
    folder: Path,
    *,
    file: Path | None = None,
    routed: bool,
    plugin_library: Path | None = None,
    provider: Provider = CPU,
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
    """
    label = "dense" if lowering == "none" else lowering
    library = plugin_library if plugin_operators(graph) else None
    # PyTorch runs in the same process: spinning threads would take its cores.
    open_runner = functools.partial(
        runner_for(value.name or "" for value in graph.graph.inputs),
        name=label,
        allow_spinning=False,
        plugin_library=library,
        provider=provider,
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


def _twin_candidate(twin: ir.Model, options: TensorRtOptions, folder: Path, *, routed: bool) -> Candidate:
    label = f"trt {options.lowering}" + (", growing" if options.cache == "growing" else "")

    def opened(*, force: bool, streams: bool = False, shown: bool = False) -> OnnxRuntimeRunner | StaticCacheRunner:
        runner = StaticCacheRunner if options.cache == "static" else OnnxRuntimeRunner
        # Only parity builds show their routers.
        inside = force or streams or shown
        model = exposed_model(twin, force=force, streams=streams) if inside else ir.to_proto(twin).SerializeToString()
        return runner(model, weights_folder=folder, name=label, allow_spinning=False)

    return Candidate(
        label,
        functools.partial(opened, force=False),
        functools.partial(opened, force=True) if routed else None,
        functools.partial(opened, force=routed, streams=True),
        functools.partial(opened, force=False, shown=True) if routed else None,
    )


def _masked_graph(source: ExportSource, folder: Path, released: ir.Model, description: ArtefactDescription) -> ir.Model:
    """The source's graph before its lowering, on the artefact's weights."""
    dtype, target = graph_dtype(description.dtype), PROVIDER_TARGETS[description.provider]
    if slots := cache_slots(released.graph):
        model = build_captured_model(source, "masked", slots, dtype, target)
    else:
        model = build_model(source, "masked", dtype, target, compared_with=description.lowering)
    if different := take_weights(model, external_tensors(released.graph)):
        raise InputError(
            f"{folder / MODEL_NAME}: its weights are not those of an export of this source: "
            f"{', '.join(sorted(different)[:5])}",
            hint="give the model (and adapter) the artefact was made from, and the version that made it",
        )
    return model
