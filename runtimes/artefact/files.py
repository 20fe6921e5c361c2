"""Whether an artefact's files are those its description vouches for."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dlo_export.checkpoints.files.file_digest import known_sha256
from dlo_export.runtimes.artefact.description import (
    ENGINES_NAME,
    MODEL_NAME,
    WEIGHTS_NAME,
    ArtefactDescription,
    ArtefactFile,
)
from dlo_export.runtimes.errors import ModelLoadError


def describe_file(path: Path) -> ArtefactFile:
    """An entry of `files` for a complete file."""
    return ArtefactFile(path, path.stat().st_size, known_sha256(path))


def verify_files(files: Iterable[ArtefactFile]) -> None:
    """Reads files as a whole and compares them with their entries.

    Raises:
        ModelLoadError: Files are missing or were changed, with all of them.
    """
    _refuse(changes(files))


def check_model_files(description: ArtefactDescription, folder: Path) -> None:
    """Compares the sizes of model.onnx and its weights with their entries, and asks whether they may be read.

    A copy that was cut short is found so; what else may have happened to the files, `verify_files` finds.

    Args:
        description: Of the artefact.
        folder: The artefact.

    Raises:
        ModelLoadError: A file is missing or of another size, or the artefact was made without weights.
        PermissionError: One may not be read: runtimes would call it damaged.
    """
    if not has_weights(description, folder):
        raise ModelLoadError(
            f"{folder}: has no weights, {WEIGHTS_NAME} was left out",
            hint="export the model again, without --no-weights",
        )
    files = _model_files(description, folder)
    _refuse(size_changes(files))
    for file in files:
        if not os.access(file.name, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.name))


def has_weights(description: ArtefactDescription, folder: Path) -> bool:
    """Whether model.onnx was written with its weights: without them it is a graph to look at, and to compile.

    Args:
        description: Of the artefact.
        folder: The artefact.
    """
    return any(file.name != folder / MODEL_NAME for file in _model_files(description, folder))


def _model_files(description: ArtefactDescription, folder: Path) -> list[ArtefactFile]:
    """All but those of engines: model.onnx and its weights. Kept ones may lie in folders of their own."""
    return [file for file in description.files if not file.name.is_relative_to(folder / ENGINES_NAME)]


def changes(files: Iterable[ArtefactFile]) -> Iterator[str]:
    """What is not as described, one sentence per file."""
    for file in files:
        if different := list(size_changes([file])):
            yield from different
        elif (found := known_sha256(file.name)) != file.sha256:
            yield f"{file.name}: was changed: its sha256 is {found[:12]}…, expected {file.sha256[:12]}…"


def size_changes(files: Iterable[ArtefactFile]) -> Iterator[str]:
    """What is missing or of another size than described, one sentence per file."""
    for file in files:
        if not file.name.is_file():
            yield f"{file.name}: does not exist"
        elif (size := file.name.stat().st_size) != file.bytes:
            yield f"{file.name}: was changed: it has {size} bytes, expected {file.bytes}"


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise ModelLoadError("; ".join(found), hint="copy the artefact again, or export the model again")
