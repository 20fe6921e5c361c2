"""Writes the TensorRT graphs of an artefact and has their engines built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.exporter.artefact_description import interface
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.engine_request import EngineRequest, intended_dtypes
from dlo_export.exporter.tensorrt.engines import build_engines
from dlo_export.exporter.tensorrt.plan import PlannedEngine, TensorRtPlan
from dlo_export.exporter.weight_file import leave_weights_out, save_weights, weight_bytes, weight_places
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.artefact.description import WEIGHTS_NAME
from dlo_export.runtimes.artefact.engine_record import EngineBuild, EngineRecord, OptimizationProfile, ParityVerdict

# Why some nodes of a 16-bit graph compute in float32.
FLOAT32_NODES = {
    "routers": "the decision is defined in fp32: a 16-bit logit near 0 decides otherwise",
    "norms": "the mean of squares overflows fp16 from 256 on, and bf16 has eight bits for it",
    "rotary angles": "a position times a frequency needs more than 16 bits",
}
# An engine holds the weights once, and for some forms its own copies of a part of them.
_ENGINE_BYTES_PER_WEIGHT_BYTE = 2


def build_planned_engines(
    plan: TensorRtPlan, target: Path, reporter: Reporter, stream_peak: float | None = None
) -> tuple[EngineRecord, ...]:
    """Builds the engines of graphs that `save_graphs` has written, and describes both.

    Args:
        plan: What to build.
        target: Folder of the graphs; the engines appear beside them.
        reporter: Told of the builds' progress.
        stream_peak: Largest magnitude measured in the residual stream; None where it was not.

    Returns:
        The engines in the artefact.

    Raises:
        EngineBuildError: A build failed.
        MachineError: Memory does not suffice.
    """
    requests = [engine_request(plan, engine, target) for engine in plan.engines]
    builds = build_engines(requests, reporter)
    return tuple(
        _record(plan, engine, request, build, stream_peak)
        for engine, request, build in zip(plan.engines, requests, builds, strict=True)
    )


def save_graphs(plan: TensorRtPlan, target: Path, reporter: Reporter, *, weights: bool = True) -> None:
    """Writes the graphs of a plan and the one file that holds their weights.

    Args:
        plan: The graphs; their weights lie in that file afterwards.
        target: Folder, made if need be.
        reporter: Told of bytes.
        weights: False leaves that file out and reads no weight: the graphs declare what it would hold.

    Raises:
        InputError: A weight is too large for the engines' type, or no finite number.
        MachineError: The disk has no room for them and the engines.
    """
    target.mkdir(exist_ok=True)
    if weights:
        _save_weights(plan, target, reporter)
    for engine in plan.engines:
        if not weights:
            leave_weights_out(engine.model, target / WEIGHTS_NAME)
        ir.save(engine.model, target / f"{engine.name}.onnx")


def _save_weights(plan: TensorRtPlan, target: Path, reporter: Reporter) -> None:
    first = plan.engines[0].model
    needed = weight_bytes(first) * (1 + len(plan.engines) * _ENGINE_BYTES_PER_WEIGHT_BYTE)
    check_disk_space(target, needed, target.parent.parent, "TensorRT's graphs and engines may need")
    with reporter.bytes("TensorRT weights") as progress:
        save_weights(first, target / WEIGHTS_NAME, progress=progress)
    for engine in plan.engines[1:]:
        # One file serves all graphs: prefill, which is first, holds what decode does; chunks may add a constant behind.
        save_weights(engine.model, target / WEIGHTS_NAME, write=False)
        shared = weight_places(engine.model).items() <= weight_places(first).items()
        assert shared, "graphs of one source lay their weights out alike"


def engine_request(plan: TensorRtPlan, engine: PlannedEngine, target: Path) -> EngineRequest:
    """What builds an engine from its saved graph, beside it."""
    operators = plugin_operators(engine.model)
    return EngineRequest(
        graph=target / f"{engine.name}.onnx",
        output=target / f"{engine.name}.engine",
        backend=plan.backend,
        targets=plan.request.targets,
        profiles=optimization_profiles(engine),
        lowering=engine.options.lowering,
        dtype=plan.dtype,
        plugin_operators=operators,
        plugin_library=plan.request.plugin_library if operators else None,
        timeout_s=plan.request.timeout_s,
        routing=plan.routing or "mlp",
        routed_layers=tuple(find_routers(engine.model.graph)),
        expected_dtypes=intended_dtypes(engine.model),
    )


def optimization_profiles(engine: PlannedEngine) -> tuple[OptimizationProfile, ...]:
    """Shapes of prefill and decode, tuned for one whole prompt and for one token of one sequence."""
    options, names = engine.options, ("prefill", "decode") if engine.phase == "both" else (engine.phase,)
    batch, step, cache = (1, 1, options.max_batch), options.max_sequence, options.max_cache
    profiles = []
    for name in names:
        sequence = (1, 1, 1) if name == "decode" else (1, step, step)
        # Only a growing cache has these two: what was there before the step, and after it.
        past = (0, cache // 2, cache - 1) if name == "decode" else (0, 0, cache - 1)
        total = (1, past[1] + sequence[1], cache)
        sizes = {"batch": batch, "sequence": sequence, "past_sequence": past, "total_sequence": total}
        shapes = {value.name or "": _shapes(value, sizes) for value in engine.model.graph.inputs}
        profiles.append(OptimizationProfile(name, shapes))
    return tuple(profiles)


def _shapes(
    value: ir.Value, sizes: Mapping[str, tuple[int, int, int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The least, optimal and largest shape of an input."""
    assert value.shape is not None, "an input's shape is declared"
    dims = [(dim, dim, dim) if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
    return tuple(dim[0] for dim in dims), tuple(dim[1] for dim in dims), tuple(dim[2] for dim in dims)


def _record(
    plan: TensorRtPlan, engine: PlannedEngine, request: EngineRequest, build: EngineBuild, stream_peak: float | None
) -> EngineRecord:
    options, graph = engine.options, engine.model.graph
    return EngineRecord(
        file=request.output,
        graph=request.graph,
        phase=engine.phase,
        dtype=plan.dtype,
        lowering=options.lowering,
        lowering_reason=engine.reason,
        capture_problem=find_lowering(options.lowering, "tensorrt").not_capturable,
        plugin_operators=request.plugin_operators,
        cache=options.cache,
        max_batch=options.max_batch,
        max_sequence=options.max_sequence,
        max_cache=options.max_cache,
        last_logits=options.last_logits,
        backend_reason=plan.backend_reason,
        profiles=request.profiles,
        interface=interface(graph),
        float32_nodes=FLOAT32_NODES if plan.dtype != "fp32" else {},
        float16_stream_peak=stream_peak,
        parity=ParityVerdict("NOT RUN", "an engine runs on a GPU only: benchmarks/gpu_check.py compares it"),
        build=build,
    )
