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
from typing import Any

import onnx_ir as ir

from benchmarks.gpu_layer_times import REPEATS, WARM_UP, repeat_step
from benchmarks.gpu_skip_proof import medians, mlp_share
from benchmarks.gpu_subject import LayerSeconds, Phase, RoutedReference, Subject
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artifact import MODEL_NAME
from dlo_export.exporter.artifact_runner import exposed_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.exporter.tensorrt.engine_request import EngineRequest, OptimizationProfile, intended_dtypes
from dlo_export.exporter.tensorrt.engines import build_engines
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.runner import Runner
from dlo_export.runtimes.static_cache.batches import StaticCacheLimits
from dlo_export.runtimes.tensorrt.engine_file import EngineFile, ProfileShapes
from dlo_export.runtimes.tensorrt.runner import TensorRtRunner

PROMPT_TOKENS = 128


def engine_subject(
    name: str, folder: Path, engines: tuple[EngineFile, ...], forced: tuple[EngineFile, ...] | None
) -> Subject:
    """An artefact's engines.

    Args:
        name: For the report.
        folder: The artefact.
        engines: As released.
        forced: Of `forced_engines`; None where nothing is routed.
    """
    first = engines[0]
    interface = first.interface
    vocab_size = interface.outputs["logits"].shape[2]
    assert isinstance(vocab_size, int), "the interface was checked"
    most = max(engine.max_sequence for engine in engines)
    limits = StaticCacheLimits(interface.max_cache, max(engine.max_batch for engine in engines), most)
    prompt_tokens = max(1, min(PROMPT_TOKENS, most, interface.max_cache - WARM_UP - REPEATS))
    return Subject(
        name,
        " and ".join(dict.fromkeys(engine.lowering for engine in engines)),
        first.dtype,
        vocab_size,
        limits,
        open_reference=functools.partial(_open_reference, folder, routed=forced is not None),
        open_free=functools.partial(TensorRtRunner, engines, name=name),
        open_forced=None if forced is None else functools.partial(TensorRtRunner, forced, name=name),
        layer_seconds=None if forced is None else functools.partial(_layer_seconds, forced, vocab_size, prompt_tokens),
        last_logits=interface.last_logits,
        mlp_share=0.0 if forced is None else mlp_share(ir.load(first.graph), forced[0].interface.routed_layers),
    )


def forced_engines(
    engines: tuple[EngineFile, ...], folder: Path, target: str, reporter: Reporter
) -> tuple[EngineFile, ...]:
    """Builds engines that take decisions, like an artefact's in everything else.

    Args:
        engines: As released.
        folder: For the new engines.
        target: Of the GPU: the only one these are for, unless the released ones are portable.
        reporter: Told of progress.

    Raises:
        EngineBuildError: TensorRT refuses.
    """
    with contextlib.ExitStack() as stack:
        graphs = [stack.enter_context(_forced_graph(engine.graph)) for engine in engines]
        models = [ir.load(graph) for graph in graphs]
        requests = [
            EngineRequest(
                graph=graph,
                output=folder / f"{index}-{engine.path.name}",
                backend=engine.backend,  # type: ignore[arg-type]
                targets=(target,) if engine.targets and engine.backend == "rtx" else (),
                profiles=tuple(_with_decisions(profile, _forced_inputs(model)) for profile in engine.profiles),
                lowering=engine.lowering,
                dtype=engine.dtype,
                plugin_library=engine.plugin_library,
                routed_layers=tuple(int(key.rpartition(".")[2]) for key in _forced_inputs(model)),
                expected_dtypes=intended_dtypes(model),
            )
            for index, (engine, graph, model) in enumerate(zip(engines, graphs, models, strict=True))
        ]
        records = build_engines(requests, reporter)
    return tuple(
        dataclasses.replace(
            engine,
            path=record.file,
            version=record.version,
            targets=record.targets,
            profiles=tuple(ProfileShapes(profile.name, profile.shapes) for profile in record.profiles),
            interface=DecoderInterface.of(
                _specs(model.graph.inputs), _specs(model.graph.outputs), record.file.name, cache="static"
            ),
            plugins=record.plugins,
            plugin_library_sha256=record.plugin_library_sha256,
        )
        for engine, record, model in zip(engines, records, models, strict=True)
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
    return [value.name for value in model.graph.inputs if value.name and value.name.startswith("force_active.")]


def _with_decisions(profile: ProfileShapes, inputs: list[str]) -> OptimizationProfile:
    return OptimizationProfile(profile.name, {**profile.shapes, **dict.fromkeys(inputs, profile.shapes["input_ids"])})


def _specs(values: Any) -> list[TensorSpec]:
    return [
        TensorSpec(
            value.name,
            value.dtype.name.lower(),
            tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape),
        )
        for value in values
    ]


def _open_reference(folder: Path, *, routed: bool) -> AbstractContextManager[Runner]:
    """The artefact's fp32 graph in ONNX Runtime."""
    if not routed:
        return OnnxRuntimeRunner(folder / MODEL_NAME, name="ONNX Runtime")
    released = load_graph(folder / MODEL_NAME)
    free, forced = (
        OnnxRuntimeRunner(exposed_model(released, force=force), weights_folder=folder, name="ONNX Runtime")
        for force in (False, True)
    )
    return RoutedReference(free, forced)


def _layer_seconds(
    engines: tuple[EngineFile, ...], vocab_size: int, prompt_tokens: int, phase: Phase, active_share: float
) -> LayerSeconds:
    samples: dict[str, list[float]] = {}
    with TensorRtRunner(engines, layer_seconds=samples) as runner:
        repeat_step(
            runner, phase, active_share, prompt_tokens=prompt_tokens, vocab_size=vocab_size, forget=samples.clear
        )
    return medians(samples)
