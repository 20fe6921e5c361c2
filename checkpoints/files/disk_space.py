"""Whether a disk has room for what is about to be written, and what is said where it had none."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlo_export.checkpoints.errors import MachineError


def check_disk_space(folder: Path, needed: int, shown: Path, wish: str) -> None:
    """Refuses to start what the disk cannot hold.

    Args:
        folder: On the disk; it exists.
        needed: Bytes.
        shown: What the message calls the place: the folder itself may be a temporary one.
        wish: What needs them, with its verb: "the weights need".

    Raises:
        MachineError: There is less room.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        has, needs = told_apart(free, needed)
        raise MachineError(
            f"{shown}: has {has} free, {wish} {needs}", hint="free some space, or give another folder with -o"
        )


def told_apart(one: int, other: int) -> tuple[str, str]:
    """Two numbers of bytes in words: in MB with as few decimals as they differ in, or, within 10 kB or so, in bytes."""
    for decimals in range(3):
        words = f"{one / 2**20:.{decimals}f} MB", f"{other / 2**20:.{decimals}f} MB"
        if words[0] != words[1]:
            return words
    return f"{one:,} bytes", f"{other:,} bytes"


@contextmanager
def no_room_reported(folder: Path) -> Iterator[None]:
    """Says which folder it is that cannot hold what is written, where a write says nothing of its place.

    Args:
        folder: Written into, and removed again: to the reader nothing is left of it.

    Raises:
        MachineError: The disk is full, a quota is used up, or a file is longer than the process may write.
    """
    try:
        yield
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise MachineError(
            f"{folder}: cannot be written: {err.strerror}",
            hint="free some space, or lift the limit; nothing was left behind",
        ) from err
