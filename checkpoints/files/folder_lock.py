"""A lock on a folder that ends with the process that holds it, however that process ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderLock:
    """Holds a folder itself (flock(2) on it), so that nothing need lie in it; renames do not matter.

    Args:
        folder: An existing folder.
        wait: Until another process gives it back.

    Attributes:
        is_held: False where the file system has no locks for folders (NFS): nothing can be told of others then.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is not set.
        OSError: There is no such folder.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            self.is_held = False
        else:
            self.is_held = True

    def holds(self, folder: Path) -> bool:
        """Whether the folder of this name is still the one that is held."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(folder))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the folder back; doing so again is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
