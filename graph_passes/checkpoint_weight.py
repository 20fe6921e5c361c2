"""A checkpoint's tensor as a graph's weight: transposed and cast a chunk at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.finite_weights import all_finite
from dlo_export.checkpoints.lazy_tensors import BlockTensor, LazyTensor, rows_at_once
from dlo_export.graph_passes.blocked_transpose import BLOCK_ROWS, transpose_into
from dlo_export.graph_passes.row_tensor import RowTensor

# Read, looked at and transposed at once: what a core's caches hold from the one to the other.
_STRIP_BYTES = 4 << 20


class WeightOverflowError(InputError):
    """A weight is too large for the element type it is cast to."""


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
        self._can_overflow = _largest(dtype) < _largest(ir.DataType.from_numpy(source.dtype))

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start:stop` of the stored layout, cast; a view of the checkpoint where they are stored like that.

        Raises:
            WeightOverflowError: A finite value becomes infinite.
        """
        with np.errstate(over="ignore"):  # an error of ours says more than NumPy's warning
            rows = self._columns(start, stop, out) if self._transposed else self._rows(start, stop, out)
        if self._can_overflow and not all_finite(rows):
            self._check_overflow()
        return rows

    @property
    def makes_rows(self) -> bool:
        """Where they are not views of the checkpoint."""
        return self._transposed or self._source.dtype != self.dtype.numpy()

    @property
    def chunk_rows(self) -> int:
        """Fewer where rows are views of the checkpoint: no page is read twice, and two chunks are held at a time."""
        return super().chunk_rows if self._transposed else max(1, super().chunk_rows // 4)

    def release(self) -> None:
        """Gives the checkpoint's pages back."""
        self._source.release()

    def _rows(self, start: int, stop: int, out: np.ndarray | None) -> np.ndarray:
        rows = self._source.rows(start, stop)
        if out is None:
            return np.ascontiguousarray(rows, self.dtype.numpy())
        out[:] = rows
        return out

    def _check_overflow(self) -> None:
        """Looks for the largest finite value: where infinities come through on request, they are not ours."""
        source, largest = self._source, 0.0
        step = rows_at_once(source.shape[0], source.nbytes)
        for start in range(0, source.shape[0], step):
            values = source.rows(start, min(start + step, source.shape[0])).astype(np.float64)
            source.release()
            largest = max(largest, float(np.abs(values[np.isfinite(values)]).max(initial=0.0)))
        with np.errstate(over="ignore"):
            overflows = not np.isfinite(np.float64(largest).astype(self.dtype.numpy()))
        if overflows:
            bf16 = "use --dtype bf16, which has the range of fp32"
            raise WeightOverflowError(
                f"{self.name}: its largest value is {largest:.6g}, {self.dtype.name.lower()} ends at "
                f"{_largest(self.dtype):.6g}",
                hint=bf16 if self.dtype == ir.DataType.FLOAT16 else "use --dtype fp32",
            )

    def _columns(self, start: int, stop: int, out: np.ndarray | None) -> np.ndarray:
        """Columns `start:stop` of the source, transposed; in `out` where it is given.

        A few columns of every row touch nearly all pages of a mapped file, so the source is read and released a range
        of rows at a time.
        """
        source = self._source
        columns = np.empty((stop - start, source.shape[0]), self.dtype.numpy()) if out is None else out
        step = rows_at_once(source.shape[0], source.nbytes)
        if isinstance(source, BlockTensor):
            step = max(1, step // 4)  # what is dequantised is held beside the chunk, with what that takes besides
        else:
            step = min(step, max(BLOCK_ROWS, _STRIP_BYTES * source.shape[0] // source.nbytes))
        for first in range(0, source.shape[0], step):
            last = min(first + step, source.shape[0])
            transpose_into(columns[:, first:last], _part(source, slice(first, last), slice(start, stop)))
            source.release()
        return columns


def _largest(dtype: ir.DataType) -> float:
    return float(dtype.max)


def _part(source: LazyTensor, rows: slice, columns: slice) -> np.ndarray:
    if isinstance(source, BlockTensor):
        return source.part(rows, columns)
    return source.rows(rows.start, rows.stop)[:, columns]
