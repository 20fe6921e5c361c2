"""Tensors that are read when they are needed: the one way in which weights pass between formats, graphs and models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


class _Rows(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def rows(self, start: int, stop: int) -> np.ndarray: ...


class TensorOfRows:
    """What follows from shape, dtype and rows of a lazy tensor, for those that compute theirs."""

    @property
    def nbytes(self: _Rows) -> int:
        """Size of `numpy()` in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self: _Rows) -> np.ndarray:
        """All rows."""
        return self.rows(0, self.shape[0])

    def release(self) -> None:
        """Nothing: rows are in memory of their own, or in somebody else's."""


@dataclass(frozen=True)
class ArrayTensor(TensorOfRows):
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

    def numpy(self) -> np.ndarray:
        """Returns the array itself."""
        return self.array

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A view of the array's rows."""
        return self.array[start:stop]


@dataclass(frozen=True)
class AbsentTensor(TensorOfRows):
    """A tensor of a model without weights: what a graph says of one, and no values.

    Attributes:
        shape: As a checkpoint would store it.
        dtype: Likewise.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Never.

        Raises:
            TypeError: Whoever reads values asks first whether there are any.
        """
        del start, stop
        raise TypeError("a tensor without values was read; please report this")


@dataclass(frozen=True)
class JoinedTensor(TensorOfRows):
    """Tensors one below the other, their columns alike.

    Attributes:
        parts: At least one.
    """

    parts: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all parts."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The type that holds all of theirs."""
        return np.result_type(*(part.dtype for part in self.parts))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Those rows of the parts that they lie in."""
        found, first = [], 0
        for part in self.parts:
            count = part.shape[0]
            some = slice(max(0, start - first), min(count, stop - first))
            if some.start < some.stop:
                found.append(part.rows(some.start, some.stop))
            first += count
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)

    def release(self) -> None:
        """Of every part."""
        for part in self.parts:
            part.release()


def joined_rows(parts: Sequence[LazyTensor]) -> LazyTensor:
    """One tensor of all parts, one below the other; the part itself where there is only one."""
    return parts[0] if len(parts) == 1 else JoinedTensor(tuple(parts))


def rows_at_once(num_rows: int, nbytes: int) -> int:
    """How many of a tensor's rows make a chunk of at most `CHUNK_BYTES`; at least one."""
    return max(1, CHUNK_BYTES * num_rows // max(1, nbytes))


def all_zeros(tensor: LazyTensor) -> bool:
    """Whether a tensor holds nothing but zeros; read in chunks, and released."""
    # The first row settles it for all but the zero matrices, without reading (and dequantising) the others.
    step = rows_at_once(tensor.shape[0], tensor.nbytes)
    starts = range(0, tensor.shape[0], step)
    zeros = not tensor.rows(0, 1).any() and not any(tensor.rows(start, start + step).any() for start in starts)
    tensor.release()
    return zeros


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
