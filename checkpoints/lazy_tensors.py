"""Tensors that are read when they are needed: the one way in which weights pass between formats, graphs and models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

CHUNK_BYTES = 64 << 20
"""What is read, computed or written at once of a large tensor."""


class LazyTensor(Protocol):
    """Shape and dtype at no cost, values on request. Its name is the key it is found under."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, as a Hugging Face checkpoint stores them: linear weights are [out, in]."""

    @property
    def dtype(self) -> np.dtype:
        """Element type of the arrays; bfloat16 is `ml_dtypes.bfloat16`."""

    @property
    def nbytes(self) -> int:
        """Size of `numpy()` in bytes."""

    def numpy(self) -> np.ndarray:
        """The whole tensor, possibly as a read-only view of a mapped file."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """numpy()[start:stop], reading or computing these rows only."""

    def release(self) -> None:
        """Gives back the memory that reading took. Arrays stay valid, and the tensor can be read again."""


@runtime_checkable
class BlockTensor(LazyTensor, Protocol):
    """A matrix whose rows are stored in blocks that can only be read whole, such as a quantised one."""

    @property
    def block_columns(self) -> int:
        """Elements of a row that make one block."""

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """numpy()[rows, columns], reading only the blocks that these elements lie in."""


@dataclass(frozen=True)
class ArrayTensor:
    """An array that is in memory already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Element type of the array."""
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return self.array.nbytes

    def numpy(self) -> np.ndarray:
        """Returns the array itself."""
        return self.array

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A view of the array's rows."""
        return self.array[start:stop]

    def release(self) -> None:
        """Nothing to release: the array belongs to whoever made it."""


def rows_at_once(num_rows: int, nbytes: int) -> int:
    """How many of a tensor's rows make a chunk of at most `CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES * num_rows // max(1, nbytes))


def are_equal(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two tensors have the same type, shape and values (NaN equals NaN); read in chunks, and released."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.shape:
        return np.array_equal(first.numpy(), second.numpy(), equal_nan=True)
    step = rows_at_once(first.shape[0], first.nbytes)
    for start in range(0, first.shape[0], step):
        some, others = first.rows(start, start + step), second.rows(start, start + step)
        equal = np.array_equal(some, others, equal_nan=True)
        first.release()
        second.release()
        if not equal:
            return False
    return True
