"""A checkpoint's tensor as a graph's weight: transposed and cast a chunk at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import BlockTensor, LazyTensor, rows_at_once
from dlo_export.graph_passes.row_tensor import RowTensor

# Source rows copied at once into a transposed block: few enough for their cache lines to survive until the next row.
TRANSPOSED_AT_ONCE = 64


class CheckpointWeight(RowTensor):
    """A lazy tensor in the graph's layout and element type.

    Args:
        name: Of the initializer.
        source: The tensor as a checkpoint stores it, linear weights [out, in].
        dtype: Element type in the graph.
        transposed: Store [in, out], as MatMul wants its right operand.
    """

    def __init__(self, name: str, source: LazyTensor, dtype: ir.DataType, *, transposed: bool = False) -> None:
        # A row of the transposed matrix is a column of the source: chunks of them take whole blocks of a quantised one,
        # so that every block is dequantised once.
        row_block = source.block_columns if transposed and isinstance(source, BlockTensor) else 1
        super().__init__(name, dtype, source.shape[::-1] if transposed else source.shape, row_block=row_block)
        self._source = source
        self._transposed = transposed

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of the stored layout, cast; the checkpoint's pages are given back afterwards."""
        if self._transposed:
            return self._columns(start, stop)
        rows = np.array(self._source.rows(start, stop), dtype=self.dtype.numpy(), order="C")
        self._source.release()
        return rows

    def _columns(self, start: int, stop: int) -> np.ndarray:
        """Columns `start:stop` of the source, transposed.

        A few columns of every row touch nearly all pages of a mapped file, so the source is read and released a range
        of rows at a time.
        """
        source = self._source
        columns = np.empty((stop - start, source.shape[0]), self.dtype.numpy())
        step = rows_at_once(source.shape[0], source.nbytes)
        for first in range(0, source.shape[0], step):
            last = min(first + step, source.shape[0])
            part = _part(source, slice(first, last), slice(start, stop))
            for row in range(0, last - first, TRANSPOSED_AT_ONCE):
                block = part[row : row + TRANSPOSED_AT_ONCE]
                columns[:, first + row : first + row + len(block)] = block.T
            source.release()
        return columns


def _part(source: LazyTensor, rows: slice, columns: slice) -> np.ndarray:
    if isinstance(source, BlockTensor):
        return source.part(rows, columns)
    return source.rows(rows.start, rows.stop)[:, columns]
