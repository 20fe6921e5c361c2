"""An artefact's engines as gpu_check's subject; for what they hide, engines built on the spot that take decisions.

A released engine decides by itself and shows nothing of it. Parity under given decisions, a layer's time with
everything and with nothing active, and latency at a wanted skip rate need decisions from outside: the same graph with
`force_active` inputs, built with the same settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import onnx_ir as ir

from benchmarks.engines.gpu_layer_times import REPEATS, WARM_UP, repeat_step
from benchmarks.engines.gpu_skip_proof import medians, mlp_share
from benchmarks.engines.gpu_subject import LayerSeconds, Phase, RoutedReference, Subject
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.interface import INPUT_IDS, LOGITS, force_active_name, layers_with
from dlo_export.exporter.artefact_description import interface
from dlo_export.exporter.artefact_runner import exposed_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.tensorrt.engine_request import EngineRequest, intended_dtypes
from dlo_export.exporter.tensorrt.engines import build_engines
from dlo_export.runtimes.artefact.description import MODEL_NAME
from dlo_export.runtimes.artefact.engine_record import EngineRecord, OptimizationProfile
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.static_cache.batches import StaticCacheLimits
from dlo_export.runtimes.tensorrt.runner import TensorRtRunner

PROMPT_TOKENS = 128


def engine_subject(
    name: str,
    folder: Path,
    engines: tuple[EngineRecord, ...],
    forced: tuple[EngineRecord, ...] | None,
    plugin_library: Path | None = None,
) -> Subject:
    """An artefact's engines.

    Args:
        name: For the report.
        folder: The artefact.
        engines: As released.
        forced: Of `forced_engines`; None where nothing is routed.
        plugin_library: libdlo_plugins.so to run them with.
    """
    first = engines[0]
    vocab_size = first.static_cache.outputs[LOGITS].shape[2]
    assert isinstance(vocab_size, int), "the interface was checked"
    most = max(engine.max_sequence for engine in engines)
    limits = StaticCacheLimits(first.max_cache, max(engine.max_batch for engine in engines), most)
    prompt_tokens = max(1, min(PROMPT_TOKENS, most, first.max_cache - WARM_UP - REPEATS))
    return Subject(
        name,
        " and ".join(dict.fromkeys(engine.lowering for engine in engines)),
        first.dtype,
        vocab_size,
        limits,
        open_reference=functools.partial(_open_reference, folder, routed=forced is not None),
        open_free=functools.partial(TensorRtRunner, engines, name=name, plugin_library=plugin_library),
        open_forced=None
        if forced is None
        else functools.partial(TensorRtRunner, forced, name=name, plugin_library=plugin_library),
        layer_seconds=None
        if forced is None
        else functools.partial(_layer_seconds, forced, plugin_library, vocab_size, prompt_tokens),
        last_logits=first.last_logits,
        mlp_share=0.0 if forced is None else mlp_share(ir.load(first.graph), forced[0].static_cache.routed_layers),
    )


def forced_engines(
    engines: tuple[EngineRecord, ...],
    folder: Path,
    target: str,
    reporter: Reporter,
    plugin_library: Path | None = None,
) -> tuple[EngineRecord, ...]:
    """Builds engines that take decisions, like an artefact's in everything else.

    Args:
        engines: As released.
        folder: For the new engines.
        target: Of the GPU: the only one these are for, unless the released ones are portable.
        reporter: Told of progress.
        plugin_library: libdlo_plugins.so to build them with.

    Raises:
        EngineBuildError: TensorRT refuses.
    """
    with contextlib.ExitStack() as stack:
        graphs = [stack.enter_context(_forced_graph(engine.graph)) for engine in engines]
        models = [ir.load(graph) for graph in graphs]
        requests = [
            EngineRequest(
                graph=graph,
                output=folder / f"{index}-{engine.file.name}",
                backend=engine.build.backend,
                targets=(target,) if engine.build.targets and engine.build.backend == "rtx" else (),
                profiles=tuple(_with_decisions(profile, _forced_inputs(model)) for profile in engine.profiles),
                lowering=engine.lowering,
                dtype=engine.dtype,
                plugin_operators=engine.plugin_operators,
                plugin_library=plugin_library if engine.plugin_operators else None,
                routed_layers=layers_with(_forced_inputs(model), force_active_name("{i}")),
                expected_dtypes=intended_dtypes(model),
            )
            for index, (engine, graph, model) in enumerate(zip(engines, graphs, models, strict=True))
        ]
        builds = build_engines(requests, reporter)
    return tuple(
        dataclasses.replace(
            engine,
            file=request.output,
            profiles=request.profiles,
            interface=interface(model.graph),
            build=build,
        )
        for engine, request, build, model in zip(engines, requests, builds, models, strict=True)
    )


@contextlib.contextmanager
def _forced_graph(graph: Path) -> Iterator[Path]:
    """A build of a graph that takes decisions, beside it for as long as it is needed: its weights must lie there."""
    path = graph.with_name(f".{graph.stem}-forced.onnx")
    if path.exists():
        raise InputError(f"{path}: exists, from another gpu_check that runs or was killed", hint="delete it")
    try:
        path.write_bytes(exposed_model(load_graph(graph), force=True))
        yield path
    finally:
        path.unlink(missing_ok=True)


def _forced_inputs(model: ir.Model) -> list[str]:
    return [value.name for value in model.graph.inputs if value.name and value.name.startswith(force_active_name(""))]


def _with_decisions(profile: OptimizationProfile, inputs: list[str]) -> OptimizationProfile:
    return OptimizationProfile(profile.name, {**profile.shapes, **dict.fromkeys(inputs, profile.shapes[INPUT_IDS])})


def _open_reference(folder: Path, *, routed: bool) -> AbstractContextManager[Runner]:
    """The artefact's fp32 graph in ONNX Runtime."""
    if not routed:
        return OnnxRuntimeRunner(folder / MODEL_NAME, name="ONNX Runtime")
    released = load_graph(folder / MODEL_NAME)

    def opened(*, force: bool) -> Runner:
        return OnnxRuntimeRunner(exposed_model(released, force=force), weights_folder=folder, name="ONNX Runtime")

    return RoutedReference(opened(force=False), opened(force=True))


def _layer_seconds(
    engines: tuple[EngineRecord, ...],
    plugin_library: Path | None,
    vocab_size: int,
    prompt_tokens: int,
    phase: Phase,
    active_share: float,
) -> LayerSeconds:
    samples: dict[str, list[float]] = {}
    with TensorRtRunner(engines, plugin_library=plugin_library, layer_seconds=samples) as runner:
        repeat_step(
            runner, phase, active_share, prompt_tokens=prompt_tokens, vocab_size=vocab_size, forget=samples.clear
        )
    return medians(samples)
