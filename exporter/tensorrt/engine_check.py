"""Why an engine on disk is not, or no longer, the one its record describes, or cannot run here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artifact import load_description
from dlo_export.exporter.tensorrt.backend import BACKENDS
from dlo_export.exporter.tensorrt.engine_fingerprint import data_files, sha256_of
from dlo_export.exporter.tensorrt.engine_gpu import find_gpu
from dlo_export.exporter.tensorrt.engine_record import EngineRecord

_OLDEST_PORTABLE = 80  # TensorRT-RTX builds for older GPUs only when they are named


def check_engine(folder: Path) -> list[str]:
    """What is wrong with an artefact's engines, one sentence each; empty when they can be used.

    Args:
        folder: The artefact.

    Raises:
        InputError: It is none, or has no engines.
    """
    entries = load_description(folder)["engines"]
    if not entries:
        raise InputError(f"{folder}: has no engines", hint="export it with --trt")
    reasons: list[str] = []
    for entry in entries:
        try:
            record = EngineRecord.from_json(entry, folder)
        except (KeyError, TypeError, ValueError) as err:
            reasons.append(f"an engine's record cannot be read: {type(err).__name__}: {err}")
            continue
        library = entry.get("plugin_library")
        reasons += explain_engine(record, folder / library if library else None)
    return reasons


def explain_engine(record: EngineRecord, plugin_library: Path | None = None, target: str | None = None) -> list[str]:
    """Why an engine is stale, damaged, or not for this machine, one sentence each; empty when it can be used.

    Args:
        record: Of the engine, its paths from here.
        plugin_library: What would be loaded with it.
        target: Of the GPU it is to run on, such as "sm89"; this machine's by default.
    """
    return [
        *_changed_files(record),
        *_version(record),
        *_target(record, target or find_gpu().target),
        *_plugins(record, plugin_library),
    ]


def _changed_files(record: EngineRecord) -> Iterator[str]:
    name = record.file.name
    if not record.file.is_file():
        yield f"{name}: {record.file} does not exist"
    elif (size := record.file.stat().st_size) != record.bytes:
        yield f"{name}: has {size} bytes, its record says {record.bytes}: it is not the engine that was built"
    elif (found := sha256_of(record.file)) != record.sha256:
        yield f"{name}: its sha256 is {found}, its record says {record.sha256}: it is not the engine that was built"
    if not record.graph.is_file():
        yield f"{name}: the graph it was built from, {record.graph}, does not exist"
        return
    if (found := sha256_of(record.graph)) != record.graph_sha256:
        yield f"{name}: {record.graph.name} changed since: its sha256 is {found}, then {record.graph_sha256}"
        return
    try:
        files = data_files(record.graph)
    except InputError as err:
        yield f"{name}: {err}"
        return
    for file in files:
        if (found := sha256_of(file)) != record.weights_sha256.get(file.name):
            then = record.weights_sha256.get(file.name, "none")
            yield f"{name}: the weights {file.name} changed since: their sha256 is {found}, then {then}"


def _version(record: EngineRecord) -> Iterator[str]:
    backend = BACKENDS[record.backend]
    if not backend.is_installed():
        yield f"{record.file.name}: needs {backend.title} {record.version}, which is not installed"
    elif (found := backend.version()) != record.version:
        yield (
            f"{record.file.name}: was built with {backend.title} {record.version}, installed is {found}; "
            "an engine runs only in the version that built it"
        )


def _target(record: EngineRecord, target: str | None) -> Iterator[str]:
    if target is None or target in record.targets:
        return
    if record.targets:
        yield f"{record.file.name}: was built for {', '.join(record.targets)}, the GPU is {target}"
    elif int(target.removeprefix("sm")) < _OLDEST_PORTABLE:
        yield f"{record.file.name}: is portable from sm{_OLDEST_PORTABLE} on, the GPU is {target}"


def _plugins(record: EngineRecord, library: Path | None) -> Iterator[str]:
    if record.plugins == "none":
        return
    if library is None:
        if record.plugins != "quick-deploy":  # those carry their kernels in the engine
            yield f"{record.file.name}: has dlo plugins, and no plugin library is given to run them with"
    elif not library.is_file():
        yield f"{record.file.name}: its plugin library {library} does not exist"
    elif record.plugin_library_sha256 not in (None, found := sha256_of(library)):
        then = record.plugin_library_sha256
        yield f"{record.file.name}: its plugin library {library.name} changed since: its sha256 is {found}, then {then}"
