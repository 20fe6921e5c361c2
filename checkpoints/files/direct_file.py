"""Files written past the page cache, where the system has a way: for what is larger than it could keep.

Through the cache, every byte is copied into pages that have to be found and cleared first, and what other programs have
there makes room for it. Written directly, the disk takes the bytes from where they were made.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np

BLOCK = 4096  # bytes; the largest block of disks in use, to which places in memory and in the file are aligned
_SCRATCH_BYTES = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


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
    """A file that is written forwards, in whole blocks that the disk fetches from memory itself.

    Chunks are best made in memory that lies to blocks as they will in the file (`aligned`): what does not is copied. Where the file system has no such writes, they go through the page cache.

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

    def write(self, chunk: memoryview) -> None:
        """Appends bytes; up to a block of them waits for more."""
        data = np.frombuffer(chunk, np.uint8)
        gap = -self._held % BLOCK
        if data.size >= gap and (data.ctypes.data + gap) % BLOCK == 0:
            # Memory and file meet at the next block: only what lies before it is copied.
            self._copy(data[:gap])
            data = data[gap:]
            whole = data.size - data.size % BLOCK
            self._write_out(data[:whole])
            data = data[whole:]
        while data.size:
            room = _SCRATCH_BYTES - self._held
            self._copy(data[:room])
            data = data[room:]

    def close(self) -> None:
        """Closes the file as it is: what waits for more is lost."""
        os.close(self._file)

    def finish(self) -> None:
        """Writes what is left of the last block."""
        self._through_cache()
        self._write_out(self._scratch[: self._held])
        self._held = 0

    def _copy(self, data: np.ndarray) -> None:
        """Puts bytes behind those that wait, and writes the blocks that are whole by now."""
        self._scratch[self._held : self._held + data.size] = data
        self._held += data.size
        whole = self._held - self._held % BLOCK
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
                if err.errno != errno.EINVAL or not self._through_cache():
                    raise

    def _through_cache(self) -> bool:
        """Has later writes go through the page cache; returns whether earlier ones did not."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        if not flags & _DIRECT:
            return False
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
        return True
