"""A folder for what is needed for a moment only."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlo_export.checkpoints.errors import MachineError
from dlo_export.checkpoints.files.disk_space import no_room_reported


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields an empty folder, which is removed at the end with all it holds.

    Raises:
        MachineError: There is no place for such folders, or it is full.
    """
    try:
        folder = tempfile.TemporaryDirectory()
    except FileNotFoundError as err:  # what tempfile says where it can write nowhere
        raise MachineError(
            f"no place for temporary files: {err.strerror}", hint="set TMPDIR to a folder that can be written to"
        ) from err
    with folder as name, no_room_reported(Path(name).parent):
        yield Path(name)
