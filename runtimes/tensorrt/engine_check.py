"""May an engine run here? The one answer, for runners, inspection and checks on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from dlo_export.checkpoints.files.file_digest import known_sha256
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.tensorrt.backend import BACKENDS

_OLDEST_PORTABLE = 80  # TensorRT-RTX builds for older GPUs only when they are named
_LIBRARY_HINT = "build libdlo_plugins.so (docs/tensorrt.md) and give it with --trt-plugin-library"


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Why an engine cannot run here.

    Attributes:
        reason: One sentence, beginning with the engine's name.
        hint: What to do about it.
        is_machine: Whether the machine lacks something; else the engine or the library is not the right one.
    """

    reason: str
    hint: str
    is_machine: bool = False


def obstacles(
    engines: Iterable[EngineRecord], target: str | None, plugin_library: Path | None = None
) -> list[Obstacle]:
    """What keeps engines from running here: the backend's version, the GPU, the plugin library.

    Whether their files are still those that were built is another question (`runtimes/artefact/files.py`).

    Args:
        engines: Of one artefact.
        target: Of the GPU they are to run on, such as "sm89" (`find_gpu`); None leaves it open.
        plugin_library: libdlo_plugins.so that would be loaded with them.
    """
    return [
        obstacle
        for engine in engines
        for obstacle in (*_version(engine), *_target(engine, target), *_plugins(engine, plugin_library))
    ]


def require_runnable(engines: Iterable[EngineRecord], target: str | None, plugin_library: Path | None = None) -> None:
    """Refuses engines that cannot run here.

    Args:
        engines: As for `obstacles`.
        target: Likewise.
        plugin_library: Likewise.

    Raises:
        BackendUnavailableError: The machine lacks the backend, or has another version of it.
        ModelLoadError: They are for other GPUs, or need a plugin library they did not get.
    """
    found = obstacles(engines, target, plugin_library)
    if not found:
        return
    error = BackendUnavailableError if any(obstacle.is_machine for obstacle in found) else ModelLoadError
    hints = dict.fromkeys(obstacle.hint for obstacle in found)
    raise error("; ".join(obstacle.reason for obstacle in found), hint="; ".join(hints))


def _version(engine: EngineRecord) -> Iterator[Obstacle]:
    backend, version = BACKENDS[engine.build.backend], engine.build.version
    hint = f"pip install {backend.distributions[0]}=={version}, or export the model again with --trt"
    if not backend.is_installed():
        yield Obstacle(
            f"{engine.file.name}: needs {backend.title} {version}, which is not installed", hint, is_machine=True
        )
    elif (found := backend.version()) != version:
        yield Obstacle(
            f"{engine.file.name}: was built with {backend.title} {version}, installed is {found}; an engine runs only "
            "in the version that built it",
            hint,
            is_machine=True,
        )


def _target(engine: EngineRecord, target: str | None) -> Iterator[Obstacle]:
    targets = engine.build.targets
    if target is None or target in targets:
        return
    hint = f"export again with --trt-target {target}"
    if targets:
        yield Obstacle(f"{engine.file.name}: was built for {', '.join(targets)}, the GPU is {target}", hint)
    elif int(target.removeprefix("sm")) < _OLDEST_PORTABLE:
        yield Obstacle(f"{engine.file.name}: is portable from sm{_OLDEST_PORTABLE} on, the GPU is {target}", hint)


def _plugins(engine: EngineRecord, library: Path | None) -> Iterator[Obstacle]:
    name, built_with = engine.file.name, engine.build.plugin_library_sha256
    if engine.build.plugins in ("none", "quick-deploy"):  # quick-deploy plugins' kernels are in the engine
        return
    if library is None:
        yield Obstacle(f"{name}: has dlo plugins, and no plugin library is given to run them with", _LIBRARY_HINT)
    elif not library.is_file():
        yield Obstacle(f"{name}: its plugin library {library} does not exist", _LIBRARY_HINT)
    elif built_with is not None and (found := known_sha256(library)) != built_with:
        yield Obstacle(
            f"{name}: the sha256 of {library} is {found[:12]}…, it was built with {built_with[:12]}…",
            "give that library, or export again with this one",
        )
