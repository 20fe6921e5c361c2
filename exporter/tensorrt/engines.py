"""TensorRT engines from ONNX graphs: one process per build, several side by side, none built twice.

What a build goes through is in `dlo_export.exporter.tensorrt.build`; this is what commands call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.backend import BACKENDS, check_backend
from dlo_export.exporter.tensorrt.engine_cache import EngineCache, cache_folder
from dlo_export.exporter.tensorrt.engine_fingerprint import Fingerprint, fingerprint
from dlo_export.exporter.tensorrt.engine_gpu import find_gpu
from dlo_export.exporter.tensorrt.engine_process import BuildProcess
from dlo_export.exporter.tensorrt.engine_progress import show_builds
from dlo_export.exporter.tensorrt.engine_record import EngineRecord, LayerCensus
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.tensorrt.engine_scheduling import Planned, expected_memory, run_builds


def build_engine(request: EngineRequest, reporter: Reporter) -> EngineRecord:
    """Builds one engine; see `build_engines`."""
    return build_engines((request,), reporter)[0]


def build_engines(
    requests: Sequence[EngineRequest],
    reporter: Reporter,
    *,
    jobs: int | None = None,
    memory_limit: int | None = None,
) -> list[EngineRecord]:
    """Builds engines, or copies them from the engine cache, each into place whole or not at all.

    Args:
        requests: What to build.
        reporter: Told of progress, and of what the user should know about the cache.
        jobs: Builds at once; the number of processors by default.
        memory_limit: Bytes all builds together may be expected to take; what is available by default.

    Returns:
        A record per request.

    Raises:
        EngineBuildError: TensorRT refused or crashed, a check failed, a plugin is missing, or a build was killed.
        MachineError: The backend, its GPU, memory or disk space is missing.
        InputError: A graph is missing, or a target is not the backend's.
    """
    for request in requests:
        check_backend(request.backend, request.targets)
    folder = cache_folder()
    cache = None if folder is None else EngineCache(folder, reporter.warn)
    with reporter.stage("hashes of graphs and weights"):
        prints = [fingerprint(request) for request in requests]
    records: dict[int, EngineRecord] = {}
    with show_builds(reporter) as listener:
        missing: dict[int, Planned] = {}
        for position, (request, found) in enumerate(zip(requests, prints, strict=True)):
            request.output.parent.mkdir(parents=True, exist_ok=True)
            stored = cache.fetch(found.key, request.output) if cache is not None and request.use_cache else None
            if stored is not None:
                records[position] = _from_cache(stored, request)
                continue
            target = request.output.parent
            check_disk_space(target, found.weight_bytes, target, "the engine, which holds the weights, needs at least")
            timings = _timing_cache(request, cache)
            memory = expected_memory(found.weight_bytes)
            missing[position] = Planned(request, timings, memory, listener(request))
        built = run_builds(list(missing.values()), jobs=jobs, memory_limit=memory_limit)
    for position, (build, result) in zip(missing, built, strict=True):
        records[position] = _record(requests[position], prints[position], build, result)
        if cache is not None and requests[position].use_cache:
            with reporter.stage("engine cache"):
                cache.store(records[position])
    return [records[position] for position in range(len(requests))]


def _record(request: EngineRequest, found: Fingerprint, build: BuildProcess, result: dict[str, Any]) -> EngineRecord:
    targets = request.targets
    if BACKENDS[request.backend].targets is None:
        targets = (str(find_gpu().target),)
    return EngineRecord(
        file=request.output,
        graph=request.graph,
        backend=request.backend,
        version=result["version"],
        targets=targets,
        profiles=request.profiles,
        lowering=request.lowering,
        dtype=request.dtype,
        plugins=result["plugins"],
        plugin_library_sha256=found.plugin_library_sha256,
        stages=tuple(build.stages),
        peak_bytes=max(stage.peak_bytes for stage in build.stages),
        census=LayerCensus.from_json(result["census"]),
        decomposed_attentions=result["decomposed_attentions"],
        checks=tuple(result["checks"]),
        bytes=result["bytes"],
        sha256=result["sha256"],
        graph_sha256=found.graph_sha256,
        weights_sha256=found.weights_sha256,
        cache_key=found.key,
    )


def _from_cache(stored: EngineRecord, request: EngineRequest) -> EngineRecord:
    return dataclasses.replace(stored, file=request.output, graph=request.graph, from_cache=True)


def _timing_cache(request: EngineRequest, cache: EngineCache | None) -> Path | None:
    backend = BACKENDS[request.backend]
    if cache is None or not backend.keeps_timings:
        return None
    return cache.timings(backend.name, backend.version(), str(find_gpu().target))
