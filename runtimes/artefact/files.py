"""Whether an artefact's files are those its description vouches for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dlo_export.checkpoints.files.file_digest import known_sha256
from dlo_export.runtimes.artefact.description import ArtefactFile
from dlo_export.runtimes.errors import ModelLoadError


def describe_file(path: Path) -> ArtefactFile:
    """An entry of `files` for a complete file."""
    return ArtefactFile(path, path.stat().st_size, known_sha256(path))


def verify_files(files: Iterable[ArtefactFile]) -> None:
    """Reads files as a whole and compares them with their entries.

    Raises:
        ModelLoadError: Files are missing or were changed, with all of them.
    """
    if problems := list(changes(files)):
        raise ModelLoadError("; ".join(problems), hint="copy the artefact again, or export the model again")


def changes(files: Iterable[ArtefactFile]) -> Iterator[str]:
    """What is not as described, one sentence per file."""
    for file in files:
        if not file.name.is_file():
            yield f"{file.name}: does not exist"
        elif (size := file.name.stat().st_size) != file.bytes:
            yield f"{file.name}: was changed: it has {size} bytes, expected {file.bytes}"
        elif (found := known_sha256(file.name)) != file.sha256:
            yield f"{file.name}: was changed: its sha256 is {found[:12]}…, expected {file.sha256[:12]}…"
