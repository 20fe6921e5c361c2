"""What a killed command left beside its output, and its removal by the next one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from dlo_export.checkpoints.files.folder_lock import FolderLock
from dlo_export.checkpoints.files.written_files import (
    is_ours,
    is_unfinished,
    remove_written_files,
    unfamiliar_files,
)

# Names of folders under way, see `whole_folder`: hidden, beside the one they are to become or were.
PARTIAL, REPLACED = ".partial", ".old"
_NAME = re.compile(r"\.(?P<folder>.+)\.[a-z0-9_]{8}(?P<kind>\.partial|\.old)", re.DOTALL)
NAME_GROWTH = len(".") + len(".12345678") + len(PARTIAL)  # characters such a name has more than its folder's


def is_name_under_way(name: str) -> bool:
    """Whether a folder of this name is taken for one under way."""
    return _NAME.fullmatch(name) is not None


def remove_leftovers(parent: Path, inputs: Iterable[Path] = ()) -> None:
    """Removes folders under way whose process is dead, and puts back what such a one had moved aside.

    Only what this program wrote is removed. What cannot be locked, read or removed stays: another process, or another
    user, has it.

    Args:
        parent: The folder they lie in.
        inputs: What is read: it stays where it is.
    """
    read = [path.resolve() for path in inputs]
    with contextlib.suppress(OSError):  # a folder that cannot be listed is reported by whoever writes to it
        for entry in os.scandir(parent):
            match = _NAME.fullmatch(entry.name)
            if match is None or not entry.is_dir(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                leftover = Path(entry.path)
                if not any(path.is_relative_to(leftover.resolve()) for path in read):
                    _settle(leftover, parent / match["folder"], match["kind"])


def _settle(leftover: Path, folder: Path, kind: str) -> None:
    lock = FolderLock(leftover)
    try:
        if not lock.is_held:
            return
        # Stopped between two renames, where the system cannot exchange folders: the old one is the whole one.
        if kind == REPLACED and is_ours(leftover) and not os.path.lexists(folder):
            leftover.rename(folder)
        elif lock.holds(leftover):
            remove_leftover(leftover)
    finally:
        lock.release()


def remove_leftover(leftover: Path) -> None:
    """Removes one folder under way: unfinished, it holds nothing but what its writer wrote; else what is listed.

    Raises:
        OSError: Something cannot be removed.
    """
    if is_unfinished(leftover):
        shutil.rmtree(leftover)
    elif is_ours(leftover) and not unfamiliar_files(leftover):
        remove_written_files(leftover)
