"""The TensorRT engines of an artefact, as its dlo_artifact.json describes them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.errors import ModelLoadError

DESCRIPTION = "dlo_artifact.json"
BACKENDS = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # to the Python module
Shape = tuple[int, ...]
_REBUILD = "export the model again with --trt"


@dataclasses.dataclass(frozen=True)
class ProfileShapes:
    """One optimization profile.

    Attributes:
        name: "prefill" or "decode".
        shapes: By input: the least, the optimal and the largest shape.
    """

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclasses.dataclass(frozen=True)
class EngineFile:
    """An engine on disk.

    Attributes:
        path: Of the plan.
        graph: The .onnx it was built from.
        backend: "tensorrt" or "rtx".
        version: Of the backend it was built with.
        targets: Compute capabilities it was built for, such as "sm89"; empty: portable.
        profiles: In the engine's order.
        lowering: "none", "masked", "compact", "if" or "plugin".
        dtype: "fp16", "bf16" or "fp32", of weights, KV cache and logits.
        max_batch: Sequences.
        max_sequence: Tokens of one step.
        interface: Inputs and outputs.
        plugins: What described the plugins to the builder: "none", "library", "twins" or "quick-deploy".
        plugin_library: libdlo_plugins.so of the artefact; None where it has none.
        plugin_library_sha256: Of the library the engine was built with; None where it needs none.
    """

    path: Path
    graph: Path
    backend: str
    version: str
    targets: tuple[str, ...]
    profiles: tuple[ProfileShapes, ...]
    lowering: str
    dtype: str
    max_batch: int
    max_sequence: int
    interface: DecoderInterface
    plugins: str = "none"
    plugin_library: Path | None = None
    plugin_library_sha256: str | None = None

    @property
    def module(self) -> str:
        """The backend's Python module."""
        return BACKENDS[self.backend]


def load_engine_files(folder: str | Path) -> tuple[EngineFile, ...]:
    """Reads and checks the engines of an artefact; together they are one model (prefill and decode, where split).

    Args:
        folder: The artefact.

    Raises:
        ModelLoadError: It has no engines, one is missing or was changed, or its description is not what this version
            reads; with everything that is wrong.
        ModelInterfaceError: An engine is no decoder with a static cache.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ModelLoadError(f"{folder}: has no {DESCRIPTION}", hint="give a folder that dlo-export wrote")
    try:
        records = json.loads(path.read_text(encoding="utf-8")).get("engines") or []
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as err:
        raise ModelLoadError(f"{path}: is not a JSON object: {err}", hint=_REBUILD) from err
    if not records:
        raise ModelLoadError(f"{folder}: its {DESCRIPTION} names no engines", hint=_REBUILD)
    if problems := [problem for index, record in enumerate(records) for problem in _problems(folder, index, record)]:
        raise ModelLoadError(f"{path}: {'; '.join(problems)}", hint=_REBUILD)
    return tuple(engine_file(folder, record) for record in records)


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "file": str,
    "graph": str,
    "backend": str,
    "version": str,
    "targets": list,
    "profiles": list,
    "lowering": str,
    "dtype": str,
    "cache": str,
    "plugins": str,
    "max_batch": int,
    "max_sequence": int,
    "sha256": str,
    "interface": dict,
}


def _problems(folder: Path, index: int, record: Any) -> Iterator[str]:
    """What keeps a record from being read, or its engine from being the one that was built."""
    where = f"engines[{index}]"
    if not isinstance(record, dict):
        yield f"{where} is a {type(record).__name__}, expected an object"
        return
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(record.get(name), kind)]
    if wrong:
        yield f"{where}: fields {wrong} are missing or of another type"
        return
    if record["backend"] not in BACKENDS:
        yield f"{where}: backend is {record['backend']!r}, expected one of {sorted(BACKENDS)}"
    if record["cache"] != "static":
        yield f"{where}: cache is {record['cache']!r}, expected 'static' (--trt-cache static)"
    files = {"file": record["file"], "graph": record["graph"]}
    for name, given in files.items():
        path = folder / given
        if not path.resolve().is_relative_to(folder.resolve()):
            yield f"{where}: {name} {given} is outside of the artefact"
        elif not path.is_file():
            yield f"{where}: {name} {given} does not exist"
        elif name == "file" and (found := file_sha256(path)) != record["sha256"]:
            yield f"{where}: {given} was changed: its sha256 is {found[:12]}…, expected {record['sha256'][:12]}…"


def engine_file(folder: Path, record: Mapping[str, Any]) -> EngineFile:
    """One entry of `engines`, its fields known to be there.

    Raises:
        ModelInterfaceError: It is no decoder with a static cache.
    """
    interface, plugin_library = record["interface"], record.get("plugin_library")
    return EngineFile(
        path=folder / record["file"],
        graph=folder / record["graph"],
        backend=record["backend"],
        version=record["version"],
        targets=tuple(record["targets"]),
        profiles=tuple(_profile(profile) for profile in record["profiles"]),
        lowering=record["lowering"],
        dtype=record["dtype"],
        max_batch=record["max_batch"],
        max_sequence=record["max_sequence"],
        interface=DecoderInterface.of(
            _specs(interface.get("inputs", [])), _specs(interface.get("outputs", [])), record["file"], cache="static"
        ),
        plugins=record["plugins"],
        plugin_library=folder / plugin_library if plugin_library else None,
        plugin_library_sha256=record.get("plugin_library_sha256"),
    )


def _profile(profile: dict[str, Any]) -> ProfileShapes:
    shapes = {}
    for name, (least, optimal, largest) in profile["shapes"].items():
        shapes[name] = (tuple(least), tuple(optimal), tuple(largest))
    return ProfileShapes(profile["name"], shapes)


def _specs(values: Sequence[dict[str, Any]]) -> list[TensorSpec]:
    return [TensorSpec(value["name"], value["dtype"], tuple(value["shape"])) for value in values]
