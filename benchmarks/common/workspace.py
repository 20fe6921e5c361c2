"""Where benchmarks keep what they make: inputs, peers' environments, artefacts. Nothing of it is committed."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.folder_lock import FolderLock
from dlo_export.checkpoints.files.uninterrupted import uninterrupted

REPOSITORY = Path(__file__).resolve().parents[2]
WORKSPACE = REPOSITORY / ".peers"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder in the workspace, on whose disk there is room; both are made, and it is removed at the end.

    Where a benchmark keeps what it makes, a rename out of it is all that is left to do.
    """
    WORKSPACE.mkdir(exist_ok=True)
    folder = tempfile.TemporaryDirectory(dir=WORKSPACE)
    try:
        yield Path(folder.name)
    finally:
        with uninterrupted():
            folder.cleanup()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder where there is none, and has it to itself among all processes that ask for that; others wait.

    Whoever waited looks again whether there is anything left to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder)
    except BlockingIOError:
        print(f"waiting for another process that writes to {folder}", file=sys.stderr)
        lock = FolderLock(folder, wait=True)
    try:
        yield
    finally:
        lock.release()


def kept(folder: Path, made_for: Any, make: Callable[[Path], Any]) -> Any:
    """What was made in a folder, as it was told of it; made on first use.

    Args:
        folder: To keep it in.
        made_for: What it depends on, in JSON's types.
        make: Gets the folder's whole path and tells what it has made, in JSON's types; paths become words.

    Raises:
        RuntimeError: The folder holds what was made for something else.
    """
    folder = folder.resolve()
    known = folder / "made.json"
    with alone_in(folder):
        if not known.exists():
            made = make(folder)
            known.write_text(json.dumps({"made for": made_for, "made": made}, default=str))
        found = json.loads(known.read_text())
    if found["made for"] != made_for:
        raise RuntimeError(f"{folder}: was made for {found['made for']}, not {made_for}")
    return found["made"]
