"""Hashes of files."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from dlo_export.checkpoints.files.direct_file import BLOCK, DirectFile, aligned, open_forwards

# A larger chunk is not kept in memory for its hash while the next one is made. Those of weights are: to hash them
# takes as long as to transpose the next one.
_KEPT_BYTES = 64 * 2**20
# By path, size, time of change and inode.
_KNOWN: dict[tuple[Path, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal; read, not mapped, so that its pages never count as this process's memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """As `file_sha256`; what this process hashed or wrote before and did not change since is not read again."""
    key = _key(path)
    if key not in _KNOWN:
        _KNOWN[key] = file_sha256(path)
    return _KNOWN[key]


def remember_sha256(path: Path, sha256: str) -> None:
    """Tells `known_sha256` the hash of a complete file, from whoever wrote it."""
    _KNOWN[_key(path)] = sha256


def _key(path: Path) -> tuple[Path, int, int, int]:
    status = path.stat()
    return path.absolute(), status.st_size, status.st_mtime_ns, status.st_ino


class HashedFile:
    """Writes a file forwards and hashes it at once, each in a thread of its own, while the next chunk is made.

    Leaving it without an exception tells `known_sha256` the hash.

    Args:
        path: The file, made anew.
        write: False only hashes: the file is there already, and holds what is passed on.
        total: Bytes of all files that are written together, as `open_forwards` wants to know.
    """

    def __init__(self, path: Path, *, write: bool = True, total: int = 0) -> None:
        self._path = path
        self._file: BinaryIO | DirectFile | None = open_forwards(path, total) if write else None
        self._digest, self._threads = hashlib.sha256(), ThreadPoolExecutor(2)
        self._pending: list[Future[Any]] = []  # what still reads the last chunk
        self._position = 0
        self._buffers: deque[np.ndarray] = deque([np.empty(0, np.uint8)] * 2)

    def write(self, data: Any) -> int:
        """Appends bytes, given as any contiguous buffer, which must not change until the next call."""
        chunk = memoryview(data).cast("B")
        self._wait()
        self._pending.append(self._threads.submit(self._digest.update, chunk))
        if self._file is not None:
            self._pending.append(self._threads.submit(self._file.write, chunk))
        if chunk.nbytes > _KEPT_BYTES:
            self._wait()
        self._position += chunk.nbytes
        return chunk.nbytes

    def buffer(self, nbytes: int) -> np.ndarray:
        """Memory to make the next chunk in, uint8 [nbytes], by turns one of two: the last chunk may still be read.

        What is allocated anew for every chunk goes back to the system, which has to find and to clear pages for the
        next.
        """
        self._buffers.rotate()
        if self._buffers[0].nbytes < nbytes + BLOCK:
            self._buffers[0] = np.empty(0, np.uint8)  # the smaller one goes first
            self._buffers[0] = np.empty(nbytes + BLOCK, np.uint8)
        return aligned(self._buffers[0], nbytes, self._position)

    def pad_to(self, offset: int) -> None:
        """Appends zeros up to an offset, which lies ahead."""
        if offset > self._position:  # else nothing to wait for
            self.write(bytes(offset - self._position))

    def _wait(self) -> None:
        """Until nobody reads the last chunk; raises what went wrong with it."""
        pending, self._pending = self._pending, []
        wait(pending)
        for future in pending:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with nullcontext() if self._file is None else self._file, self._threads:
            if error is None:
                self._wait()
        if error is None:
            remember_sha256(self._path, self._digest.hexdigest())
