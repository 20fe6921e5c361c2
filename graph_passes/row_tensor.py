"""Tensors that are computed a block of rows at a time, so that writing one never needs all of it in memory."""

from __future__ import annotations

import abc
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

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
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`, C-contiguous, in the stored element type."""

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
            chunk = self.rows(start, min(start + step, self._row_count))
            file.write(chunk.view(np.uint8).data)  # as bytes: bfloat16 has no buffer format of its own
            self.release()

    @property
    def _row_count(self) -> int:
        return self.shape.numpy()[0]


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> np.ndarray:
    """Rows `start:stop` of any tensor, without computing the others where the tensor allows it."""
    if isinstance(tensor, RowTensor):
        return tensor.rows(start, stop)
    return np.asarray(tensor.numpy()[start:stop])
