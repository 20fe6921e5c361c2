"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlo_export.checkpoints.errors import InputError


class FolderExistsError(InputError):
    """The folder to write exists and holds something."""


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling to write into, renamed to `folder` when the block ends without an exception.

    Args:
        folder: Where the result appears. Its parents are made.
        overwrite: Replace a folder that holds something; it stays untouched until the new one is complete.

    Raises:
        FolderExistsError: The folder holds something and `overwrite` is not set, or it is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FolderExistsError(f"{folder}: found a file, expected a folder or nothing\n\nhint: choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FolderExistsError(f"{folder}: found a folder that is not empty\n\nhint: choose another, or overwrite it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        # mkdtemp makes private folders; what is shared is decided by the user's umask, as for any other folder.
        staging.chmod(0o777 & ~_umask())
        yield staging
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, folder: Path) -> None:
    """Renames the complete folder into place, moving what was there aside first."""
    if not folder.exists():
        staging.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    folder.rename(aside / folder.name)
    try:
        staging.rename(folder)
    except OSError:
        (aside / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(aside)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
