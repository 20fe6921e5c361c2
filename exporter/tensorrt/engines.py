"""TensorRT engines from ONNX graphs: one process per build, several side by side, none built twice.

What a build goes through is in `dlo_export.exporter.tensorrt.build`; this is what commands call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.files.file_digest import remember_sha256
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.backend import check_backend
from dlo_export.exporter.tensorrt.build_display import show_builds
from dlo_export.exporter.tensorrt.build_process import BuildProcess
from dlo_export.exporter.tensorrt.build_queue import Planned, expected_memory, run_builds
from dlo_export.exporter.tensorrt.engine_cache import EngineCache, cache_folder
from dlo_export.exporter.tensorrt.engine_fingerprint import Fingerprint, fingerprint
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.runtimes.artefact.engine_record import EngineBuild, LayerCensus
from dlo_export.runtimes.artefact.typed_json import from_json
from dlo_export.runtimes.tensorrt.backend import BACKENDS
from dlo_export.runtimes.tensorrt.gpu import find_gpu


def build_engine(request: EngineRequest, reporter: Reporter) -> EngineBuild:
    """Builds one engine, as `build_engines` builds several."""
    return build_engines((request,), reporter)[0]


def build_engines(
    requests: Sequence[EngineRequest],
    reporter: Reporter,
    *,
    jobs: int | None = None,
) -> list[EngineBuild]:
    """Builds engines, or copies them from the engine cache, each into place whole or not at all.

    Args:
        requests: What to build.
        reporter: Told of progress, and of what the user should know about the cache.
        jobs: Builds at once; the number of processors by default.

    Returns:
        What was built, per request.

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
    builds: dict[int, EngineBuild] = {}
    with show_builds(reporter) as listener:
        missing: dict[int, Planned] = {}
        for position, (request, found) in enumerate(zip(requests, prints, strict=True)):
            request.output.parent.mkdir(parents=True, exist_ok=True)
            stored = cache.fetch(found.key, request.output) if cache is not None and request.use_cache else None
            if stored is not None:
                builds[position] = dataclasses.replace(stored, from_cache=True)
                continue
            target = request.output.parent
            check_disk_space(target, found.weight_bytes, target, "the engine, which holds the weights, needs at least")
            timings = _timing_cache(request, cache)
            memory = expected_memory(found.weight_bytes)
            missing[position] = Planned(request, timings, memory, listener(request))
        built = run_builds(list(missing.values()), jobs=jobs)
    for position, (process, result) in zip(missing, built, strict=True):
        request = requests[position]
        builds[position] = _engine_build(request, prints[position], process, result)
        if cache is not None and request.use_cache:
            with reporter.stage("engine cache"):
                cache.store(builds[position], request.output)
    for position, build in builds.items():
        remember_sha256(requests[position].output, build.sha256)  # of what was written, or copied, a moment ago
    return [builds[position] for position in range(len(requests))]


def _engine_build(
    request: EngineRequest, found: Fingerprint, process: BuildProcess, result: dict[str, Any]
) -> EngineBuild:
    targets = request.targets
    if BACKENDS[request.backend].targets is None:
        targets = (str(find_gpu().target),)
    return EngineBuild(
        backend=request.backend,
        version=result["version"],
        targets=targets,
        plugins=result["plugins"],
        plugin_library_sha256=found.plugin_library_sha256,
        bytes=result["bytes"],
        sha256=result["sha256"],
        stages=tuple(process.stages),
        census=from_json(LayerCensus, result["census"], request.output.parent),
        decomposed_attentions=result["decomposed_attentions"],
        checks=tuple(result["checks"]),
        cache_key=found.key,
        from_cache=False,
    )


def _timing_cache(request: EngineRequest, cache: EngineCache | None) -> Path | None:
    backend = BACKENDS[request.backend]
    if cache is None or not backend.keeps_timings:
        return None
    return cache.timings(backend.name, backend.version(), str(find_gpu().target))
