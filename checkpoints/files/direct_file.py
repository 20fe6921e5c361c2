"""Files that are written forwards, large ones past the page cache where the system has a way.

Through the cache every byte is copied into a page that has to be found and cleared first, and what other programs have
there makes room for it. Written directly, the disk fetches the bytes from where they were made.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

# Files of this size, all that are written together, would be on the disk before anybody reads them again.
DIRECT_BYTES = 2 << 30
BLOCK = 4096  # bytes; the largest block of disks in use, to which places in memory and in the file are aligned
_SCRATCH_BYTES = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


def open_forwards(path: Path, total: int) -> BinaryIO | DirectFile:
    """Makes a file anew, to be written from its begin to its end.

    Args:
        path: The file.
        total: Bytes of all files that are written together.
    """
    return DirectFile(path) if total >= DIRECT_BYTES else path.open("wb")


def aligned(memory: np.ndarray, nbytes: int, position: int = 0) -> np.ndarray:
    """A part of some memory that lies to blocks as bytes from `position` on do in a file.

    Args:
        memory: uint8, a block longer than what is wanted.
        nbytes: What is wanted.
        position: In the file.
    """
    start = (position - memory.ctypes.data) % BLOCK
    return memory[start : start + nbytes]


class DirectFile:
    """A file that is written forwards, past the page cache; a context manager.

    Only whole blocks can be. What is given in memory that lies to blocks as it will in the file (`aligned`) is written
    from there, anything else is copied first. Where the file system has no such writes, they go through the cache.

    Args:
        path: The file, made anew.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        self._scratch = aligned(np.empty(_SCRATCH_BYTES + BLOCK, np.uint8), _SCRATCH_BYTES)
        self._held = 0  # bytes at the begin of the scratch memory, less than a block between two calls

    def write(self, data: Any) -> int:
        """Appends bytes, given as any contiguous buffer; less than a block of them waits for more."""
        rest = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        nbytes, gap = rest.size, -self._held % BLOCK
        if nbytes >= gap and (rest.ctypes.data + gap) % BLOCK == 0:
            # Memory and file meet at the next block: only what lies before it, and behind the last one, is copied.
            self._copy(rest[:gap])
            whole = (nbytes - gap) // BLOCK * BLOCK
            self._write_out(rest[gap : gap + whole])
            rest = rest[gap + whole :]
        while rest.size:
            room = _SCRATCH_BYTES - self._held
            self._copy(rest[:room])
            rest = rest[room:]
        return nbytes

    def flush(self) -> None:
        """Writes what waits, which need not be a block; all that comes later goes through the cache."""
        self._leave_direct_writes()
        self._write_out(self._scratch[: self._held])
        self._held = 0

    def fileno(self) -> int:
        """Of the open file."""
        return self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            os.close(self._file)

    def _copy(self, data: np.ndarray) -> None:
        """Puts bytes behind those that wait, and writes the blocks that are whole by now."""
        self._scratch[self._held : self._held + data.size] = data
        self._held += data.size
        whole = self._held // BLOCK * BLOCK
        if whole:
            self._write_out(self._scratch[:whole])
            self._held -= whole
            self._scratch[: self._held] = self._scratch[whole : whole + self._held]

    def _write_out(self, data: np.ndarray) -> None:
        while data.size:
            try:
                data = data[os.write(self._file, data.data) :]
            except OSError as err:
                # Blocks of this disk are larger, or a limit ends within one: the cache takes any number of bytes, and
                # says what is wrong with them.
                if err.errno != errno.EINVAL or not self._leave_direct_writes():
                    raise

    def _leave_direct_writes(self) -> bool:
        """Has later writes go through the page cache; returns whether earlier ones did not."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        if not flags & _DIRECT:
            return False
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
        return True
