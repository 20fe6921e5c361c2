"""Weights files mapped into memory: arrays without copies, pages given back after use."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.regular_file import regular_size
from dlo_export.checkpoints.lazy_tensors import TensorOfRows


class MappedFile:
    """A read-only mapping of a whole file.

    Closing drops this object's hold on the mapping; arrays handed out before stay valid and keep it alive.

    Args:
        path: File to map.

    Raises:
        CheckpointError: The file cannot be read or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            regular_size(path)
            with path.open("rb") as stream:
                self.nbytes = os.fstat(stream.fileno()).st_size
                if self.nbytes == 0:
                    raise CheckpointError(f"{path}: the file is empty", hint="was the download cut short?")
                self._mapping: mmap.mmap | None = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as err:
            raise CheckpointError(f"{path}: cannot be read ({err})", hint="is it a file, and may you read it?") from err

    @property
    def mapping(self) -> mmap.mmap:
        """The mapping, a readable buffer of `nbytes` bytes.

        Raises:
            ValueError: The file was closed.
        """
        if self._mapping is None:
            raise ValueError(f"{self.path}: read after the checkpoint was closed")
        return self._mapping

    def array(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """Read-only view of the file's bytes from `offset` on; nothing is read until it is used."""
        flat = np.frombuffer(self.mapping, dtype=dtype, count=prod(shape), offset=offset)
        return flat.reshape(shape)

    def release(self, offset: int, nbytes: int) -> None:
        """Lets the system take back the memory of these pages; a later read fetches them from the file again."""
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Outwards to whole pages: inwards would leave the borders of every tensor resident.
        start = offset - offset % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Drops the mapping."""
        self._mapping = None


@dataclass(frozen=True)
class MappedTensor(TensorOfRows):
    """A tensor stored uncompressed, row-major and little-endian, in a mapped file.

    Attributes:
        shape: As stored.
        dtype: As stored; ml_dtypes.bfloat16 for bf16.
        file: Where its bytes are.
        offset: Of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: MappedFile
    offset: int

    def numpy(self) -> np.ndarray:
        """The tensor as a read-only view of the file, without a copy."""
        return self.file.array(self.offset, self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """numpy()[start:stop], without a copy."""
        return self.numpy()[start:stop]

    def release(self) -> None:
        """Gives the tensor's memory back; reading it again is allowed and slow."""
        self.file.release(self.offset, self.nbytes)
