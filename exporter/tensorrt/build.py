"""Builds one engine, in the process it runs in: import, parse, checks, build, write."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dlo_export.checkpoints.errors import EngineBuildError
from dlo_export.exporter.tensorrt.build_events import EventPipe
from dlo_export.exporter.tensorrt.build_log import BuildLog, builder_errors, hint_for, parser_errors
from dlo_export.exporter.tensorrt.build_progress import PhaseProgress
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.tensorrt.network_checks import CHECKS, check_network, make_attentions_decomposable
from dlo_export.runtimes.artefact.engine_record import PluginSource
from dlo_export.runtimes.artefact.typed_json import to_json
from dlo_export.runtimes.tensorrt.backend import BACKENDS, Backend

_WRITTEN_AT_ONCE = 64 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where a build puts things.

    Attributes:
        partial: The engine while it is written; renamed when complete.
        timing_cache: Timings of earlier builds, for backends that keep them; None where there is none.
    """

    partial: Path
    timing_cache: Path | None


def build(request: EngineRequest, workplace: Workplace, pipe: EventPipe) -> dict[str, Any]:
    """Builds the engine and puts it into place.

    Args:
        request: What to build.
        workplace: Where.
        pipe: Told of stages, progress and log lines.

    Returns:
        What `EngineBuild` says of the engine and only this process knows.

    Raises:
        EngineBuildError: The parser, a check or the builder refused; with all reasons.
        MachineError: The backend cannot be imported.
        OSError: The engine cannot be written.
    """
    backend = BACKENDS[request.backend]
    log = BuildLog(
        backend,
        lambda severity, text: pipe.send("log", severity=severity, text=text),
        lambda doing: pipe.send("doing", text=doing),
    )
    with pipe.stage("import"):
        trt = backend.load()
        logger = log.logger(trt)
        # Before a parser meets one of their nodes.
        plugins = _provide_plugins(trt, request)
        builder = trt.Builder(logger)
    with pipe.stage("parse"):
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, logger)
        _parse(request, backend, parser, log)
    with pipe.stage("checks"):
        # What parsing made of the graph is compared with what was meant, before minutes go into building it.
        census, problems = check_network(trt, network, request)
        if problems:
            listed = "\n  ".join(problems)
            raise EngineBuildError(
                f"{request.graph.name}: {backend.title} parsed it into something else than was meant:\n  {listed}",
                hint="this is a bug of dlo-export, or the graph is not one of its own; please report it",
            )
        decomposed = make_attentions_decomposable(trt, network)
    with pipe.stage("build"):
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32: routers decide by it
        monitor = PhaseProgress(lambda phase, done: pipe.send("progress", phase=phase, fraction=done)).monitor(trt)
        config.progress_monitor = monitor
        _set_targets(trt, config, request)
        _add_profiles(builder, network, config, request, log)
        _load_timings(config, backend, workplace)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _refused(request, backend, "cannot build the engine", builder_errors(log.errors))
        _save_timings(config, backend, workplace)
    with pipe.stage("write"):
        sha256 = _write(memoryview(plan), request.output, workplace.partial)
    return {
        "version": str(trt.__version__),
        "plugins": plugins,
        "census": to_json(census, Path()),
        "decomposed_attentions": decomposed,
        "checks": list(CHECKS),
        "bytes": plan.nbytes,
        "sha256": sha256,
    }


def _network_flags(trt: Any) -> int:
    """Those of these that the backend knows: RTX has strongly typed networks only, TensorRT 11 need not be told."""
    wanted = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
    flags = (getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in wanted)
    return sum(1 << int(flag) for flag in flags if flag is not None)


def _provide_plugins(trt: Any, request: EngineRequest) -> PluginSource:
    """Registers what describes the graph's plugins to the builder; says what that is."""
    if not request.plugin_operators:
        return "none"
    from dlo_export.plugins import registration  # noqa: PLC0415 - few builds need them

    if request.plugin_library is not None:
        registration.load_library(trt, request.plugin_library)
        return "library"
    if request.backend == "rtx":
        registration.register_twins()
        return "twins"
    registration.register_quick_deploy()
    return "quick-deploy"


def _parse(request: EngineRequest, backend: Backend, parser: Any, log: BuildLog) -> None:
    if parser.parse_from_file(str(request.graph)):
        return
    errors = parser_errors(backend, parser) or builder_errors(log.errors)
    raise _refused(request, backend, "cannot parse the graph", errors)


def _refused(request: EngineRequest, backend: Backend, what: str, errors: list[str]) -> EngineBuildError:
    listed = "\n  ".join(errors) or "it gave no reason"
    return EngineBuildError(f"{request.graph.name}: {backend.title} {what}:\n  {listed}", hint=hint_for(errors))


def _set_targets(trt: Any, config: Any, request: EngineRequest) -> None:
    # Enterprise TensorRT builds for the GPU it runs on, and RTX for every one unless told.
    if request.backend != "rtx" or not request.targets:
        return
    config.num_compute_capabilities = len(request.targets)
    for index, target in enumerate(request.targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)


def _add_profiles(builder: Any, network: Any, config: Any, request: EngineRequest, log: BuildLog) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    free = {tensor.name for tensor in inputs if -1 in tuple(tensor.shape)}
    problems: list[str] = []
    for position, profile in enumerate(request.profiles):
        missing, unknown = free - profile.shapes.keys(), profile.shapes.keys() - {tensor.name for tensor in inputs}
        problems += [f"profile '{profile.name}' has no shapes for input '{name}'" for name in sorted(missing)]
        problems += [f"profile '{profile.name}' has shapes for '{name}', which is no input" for name in sorted(unknown)]
        if missing or unknown:
            continue
        made = builder.create_optimization_profile()
        for name, (least, optimal, largest) in profile.shapes.items():
            made.set_shape(name, least, optimal, largest)
        # A profile that is refused gets no number; why is said in the log only.
        if config.add_optimization_profile(made) != position:
            refused = "; ".join(log.errors) or "shapes must be min <= opt <= max and of the input's rank"
            problems.append(f"profile '{profile.name}' was refused: {refused}")
    if problems:
        raise EngineBuildError("\n".join(problems), hint="give every input with free axes its min, opt and max shape")


def _load_timings(config: Any, backend: Backend, workplace: Workplace) -> None:
    """Gives the builder the timings of earlier builds (`tensorrt` only; not verified without a GPU)."""
    if not backend.keeps_timings or workplace.timing_cache is None:
        return
    known = workplace.timing_cache.read_bytes() if workplace.timing_cache.exists() else b""
    config.set_timing_cache(config.create_timing_cache(known), False)


def _save_timings(config: Any, backend: Backend, workplace: Workplace) -> None:
    if not backend.keeps_timings or workplace.timing_cache is None:
        return
    workplace.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    partial = workplace.timing_cache.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
    partial.rename(workplace.timing_cache)


def _write(plan: memoryview, output: Path, partial: Path) -> str:
    """Writes a plan beside its place and renames it; returns its sha256."""
    digest = hashlib.sha256()
    # From here on a termination, also the one a dying parent causes, must pass through the finally below.
    signal.signal(signal.SIGTERM, _stop)
    try:
        with partial.open("wb") as file:
            for part in _parts(plan):
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def _parts(plan: memoryview) -> Iterator[memoryview]:
    for start in range(0, plan.nbytes, _WRITTEN_AT_ONCE):
        yield plan[start : start + _WRITTEN_AT_ONCE]


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(1)
