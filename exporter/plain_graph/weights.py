"""Initializers that stream from a checkpoint: transposed, cast and written a chunk at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.opening import CheckpointTensor
from dlo_export.graph_passes.row_tensor import RowTensor

# Source rows copied at once into a transposed block: few enough for their cache lines to survive until the next row.
TRANSPOSE_BLOCK = 64


class CheckpointWeight(RowTensor):
    """A checkpoint tensor in the graph's layout and dtype.

    Args:
        source: The tensor as stored, linear weights [out, in].
        dtype: Element type in the graph.
        transposed: Store [in, out], as MatMul wants its right operand.
        name: Initializer name, the tensor's own unless given.
    """

    def __init__(
        self, source: CheckpointTensor, dtype: ir.DataType, *, transposed: bool = False, name: str | None = None
    ) -> None:
        shape = source.shape[::-1] if transposed else source.shape
        super().__init__(name or source.name, dtype, shape)
        self._source = source
        self._transposed = transposed

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of the stored layout, cast; the checkpoint's pages are given back afterwards."""
        target = self.dtype.numpy()
        if self._transposed:
            block = _transposed_columns(self._source.numpy(), start, stop, target)
        else:
            block = np.array(self._source.rows(start, stop), dtype=target, order="C")
        self._source.release()
        return block


def _transposed_columns(source: np.ndarray, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
    block = np.empty((stop - start, source.shape[0]), dtype)
    for row in range(0, source.shape[0], TRANSPOSE_BLOCK):
        block[:, row : row + TRANSPOSE_BLOCK] = source[row : row + TRANSPOSE_BLOCK, start:stop].T
    return block
