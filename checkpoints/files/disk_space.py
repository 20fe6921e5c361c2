"""Whether a disk has room for what is about to be written."""

from __future__ import annotations

import shutil
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
        raise MachineError(
            f"{shown}: has {free / 2**20:.0f} MB free, {wish} {needed / 2**20:.0f} MB",
            hint="free some space, or give another folder with -o",
        )
