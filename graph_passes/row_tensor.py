"""Tensors that are computed a block of rows at a time, so that writing one never needs all of it in memory."""

from __future__ import annotations

import abc
import math
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.files.file_digest import HashedFile
from dlo_export.checkpoints.lazy_tensors import rows_at_once


class RowTensor(ir.LazyTensor, abc.ABC):
    """A dense tensor defined by the function that computes rows `start:stop` of it.

    Args:
        name: Initializer name.
        dtype: Element type of the stored tensor.
        shape: Its dimensions; the first one counts the rows.
        row_block: Rows that are computed together whether all of them are asked for or not: chunks are whole blocks.
    """

    def __init__(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], *, row_block: int = 1) -> None:
        super().__init__(lambda: ir.Tensor(self.numpy(), dtype=dtype), dtype, ir.Shape(shape), name=name)
        self.row_block = row_block

    @abc.abstractmethod
    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` in the stored element type, C-contiguous unless they are made in `out`.

        Args:
            start: The first.
            stop: Behind the last.
            out: Of their shape and type; given to a tensor that `makes_rows`, which returns it.
        """

    @property
    def makes_rows(self) -> bool:
        """Whether rows can be made in memory that is there already; else they are a view, or come as they come."""
        return False

    @property
    def chunk_rows(self) -> int:
        """How many rows are computed and written at once; made whole blocks, at least one."""
        return rows_at_once(self._row_count, self.nbytes)

    def release(self) -> None:
        """Gives back what reading rows took, where they are views; arrays stay valid."""

    def numpy(self) -> np.ndarray:
        """The whole tensor. Prefer `tofile` or `rows` for large ones."""
        return self.rows(0, self._row_count)

    def tofile(self, file: BinaryIO) -> None:
        """Writes the tensor in chunks of at most `lazy_tensors.CHUNK_BYTES`, but of at least one block of rows."""
        step = max(1, self.chunk_rows // self.row_block) * self.row_block
        for start in range(0, self._row_count, step):
            stop = min(start + step, self._row_count)
            chunk = self.rows(start, stop, self._memory(file, stop - start))
            file.write(chunk.view(np.uint8).data)  # as bytes: bfloat16 has no buffer format of its own
            self.release()

    def _memory(self, file: BinaryIO, rows: int) -> np.ndarray | None:
        """What so many rows are made in, where the file keeps memory for chunks."""
        if not (self.makes_rows and isinstance(file, HashedFile)):
            return None
        dtype, shape = self.dtype.numpy(), (rows, *self.shape.numpy()[1:])
        return file.buffer(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    @property
    def _row_count(self) -> int:
        return self.shape.numpy()[0]


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
    """Rows `start:stop` of any tensor, without computing the others where the tensor allows it; `out` as for `rows`."""
    if isinstance(tensor, RowTensor):
        return tensor.rows(start, stop, out)
    return np.asarray(tensor.numpy()[start:stop])
