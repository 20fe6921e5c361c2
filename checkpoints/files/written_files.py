"""Which of a folder's files this program wrote: what it may replace or remove, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_file import read_json

LIST_NAME = "dlo_files.json"
FORMAT_VERSION = 1
_PARTIAL_LIST = f"{LIST_NAME}.partial"
# The files that tell what a folder of ours holds: an artefact, an adapter, a trained checkpoint, one of a training run.
ARTEFACT_FILE, ADAPTER_FILE = "dlo_artifact.json", "adapter_config.json"
TRAINING_FILE, RUN_FILE = "training.json", "capacities.json"
# What may lie beside a description where there is no list: an adapter is two files by its format, and version 0.1
# wrote artefacts without one.
_ADAPTER = ("adapter.safetensors", ADAPTER_FILE)
_ARTEFACT = (
    "model.onnx",
    "model.onnx.data",
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "parity.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "engines/model.onnx.data",
    *(f"engines/{name}.{kind}" for name in ("model", "prefill", "decode") for kind in ("onnx", "engine")),
    ARTEFACT_FILE,
)
# Fields that tell our adapter_config.json from other tools' files of that name.
_ADAPTER_FIELDS = {"format_version", "routing", "is_dlo", "injected_layers"}


class _Written(NamedTuple):
    """Names of the files written into a folder, the one that tells so being the last, and their stamps where kept."""

    names: tuple[str, ...] = ()
    stamps: Mapping[str, Any] = MappingProxyType({})

    @property
    def folders(self) -> set[str]:
        """Folders these files lie in, the outermost apart."""
        return {str(parent) for name in self.names for parent in PurePosixPath(name).parents if parent.name}


def mark_unfinished(folder: Path) -> None:
    """Says of an empty folder that everything in it is this program's, until `list_files` says what it wrote."""
    _save_list(folder, None)


def list_files(folder: Path) -> None:
    """Writes the list of what the finished folder holds; an adapter describes itself and gets none."""
    if _is_adapter(folder):
        (folder / LIST_NAME).unlink()
        return
    entries = _entries(folder)
    files = [name for name in sorted(entries) if name != LIST_NAME and not entries[name].is_dir()]
    _save_list(folder, {name: _stamp(entries[name]) for name in files})


def is_unfinished(folder: Path) -> bool:
    """Whether the folder was never finished: marked so, or its writer was stopped before it could do even that."""
    content = read_object(folder / LIST_NAME)
    if content is not None:
        return "files" in content and content["files"] is None
    return {path.name for path in folder.iterdir()} <= {_PARTIAL_LIST}


def is_ours(folder: Path) -> bool:
    """Whether this program wrote the folder; others may have put files into it."""
    return bool(written_names(folder))


def written_names(folder: Path) -> tuple[str, ...]:
    """The files this program wrote into a folder, whether they are still there or not; none in another's folder."""
    return _written(folder).names


def unfamiliar_files(folder: Path) -> list[str]:
    """What the folder holds and this program did not write: all of it where the folder is none of ours.

    Weights that are no longer as they were written count too: training saves its result in their place.

    Returns:
        Paths relative to the folder, folders with a slash at their end.
    """
    written, found = _written(folder), []
    for name, path in sorted(_entries(folder).items()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found.append(name)
        elif path.is_dir():
            found += [] if name in written.folders else [f"{name}/"]
        elif name not in written.names:
            found.append(name)
        elif path.suffix == ".safetensors" and _stamp(path) != written.stamps.get(name, _stamp(path)):
            found.append(f"{name} (changed since it was written)")
    return found


def damaged_files(folder: Path) -> list[str]:
    """Which of the files this program wrote into a folder are gone or have another size than they were written with.

    A power failure may do that, or a copy that was cut short. Whose size was not kept is not looked at.
    """
    stamps = {name: stamp for name, stamp in _written(folder).stamps.items() if isinstance(stamp, dict)}
    sizes = {name: path.lstat().st_size for name, path in _entries(folder).items()}
    return [name for name, stamp in stamps.items() if "bytes" in stamp and sizes.get(name) != stamp["bytes"]]


def remove_written_files(folder: Path) -> None:
    """Removes what this program wrote, and the folder with it if nothing else is left there.

    Raises:
        OSError: A file cannot be removed, or the folder holds others: they stay.
    """
    written = _written(folder)
    # Listed by walking, which follows no links, so that a name in the list cannot lead out of the folder.
    entries = _entries(folder)
    paths = [entries[name] for name in written.names if name in entries]
    for path in paths[:-1]:
        path.unlink()
    for name in sorted(written.folders & entries.keys(), reverse=True):
        entries[name].rmdir()
    # Last, so that a folder whose removal was cut short is still known as ours.
    for path in paths[-1:]:
        path.unlink()
    folder.rmdir()


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None for whatever else is there, a link or too large a file too: it says nothing of the folder."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return read_json(path)
    except InputError:
        return None


def _entries(folder: Path) -> dict[str, Path]:
    """Everything in a folder and in its folders by relative name; links are not followed."""
    walk = os.walk(folder, onerror=_raise)  # which would leave out what it cannot list
    paths = [Path(place, name) for place, folders, files in walk for name in (*folders, *files)]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _raise(error: OSError) -> None:
    raise error


def _stamp(path: Path) -> dict[str, int]:
    """Size, and time of the last change in whole seconds, which archives and copies keep."""
    status = path.lstat()
    return {"bytes": status.st_size, "modified": int(status.st_mtime)}


def _written(folder: Path) -> _Written:
    content = read_object(folder / LIST_NAME)
    if content is not None and isinstance(content.get("files"), dict):
        return _Written((*content["files"], LIST_NAME), content["files"])
    if _is_adapter(folder):
        return _Written(_ADAPTER)
    description = read_object(folder / ARTEFACT_FILE)
    return _Written(_ARTEFACT) if description is not None and "format_version" in description else _Written()


def _is_adapter(folder: Path) -> bool:
    content = read_object(folder / ADAPTER_FILE)
    return content is not None and content.keys() >= _ADAPTER_FIELDS


def _save_list(folder: Path, files: dict[str, Any] | None) -> None:
    """Writes the list in one step: a reader finds the old one or the new one."""
    content = {"format_version": FORMAT_VERSION, "files": files}
    (folder / _PARTIAL_LIST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / _PARTIAL_LIST).replace(folder / LIST_NAME)
