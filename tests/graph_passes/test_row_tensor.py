import io

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints import lazy_tensors
from dlo_export.graph_passes.row_tensor import RowTensor, read_rows


class Counted(RowTensor):
    """Rows of an array; what was asked for is kept."""

    def __init__(self, array, dtype, row_block=1):
        super().__init__("counted", dtype, array.shape, row_block=row_block)
        self.array, self.asked = array, []

    def rows(self, start, stop, out=None):
        self.asked.append((start, stop))
        return self.array[start:stop]


@pytest.mark.parametrize("row_block", [1, 4, 32])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.BFLOAT16])
def test_bytes_are_written_in_whole_blocks_when_the_tensor_is_larger_than_a_chunk(monkeypatch, row_block, dtype):
    numpy_dtype = np.float32 if dtype == ir.DataType.FLOAT else ml_dtypes.bfloat16
    array = np.arange(90, dtype=np.float32).reshape(18, 5).astype(numpy_dtype)
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 6 * array[0].nbytes)
    tensor, file = Counted(array, dtype, row_block), io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == array.tobytes()
    assert [start for start, _ in tensor.asked] == list(range(0, 18, {1: 6, 4: 4, 32: 32}[row_block]))


def test_only_the_rows_asked_for_are_computed_when_a_tensor_can():
    tensor = Counted(np.arange(6, dtype=np.float32).reshape(3, 2), ir.DataType.FLOAT)
    np.testing.assert_array_equal(read_rows(tensor, 1, 2), [[2, 3]])
    assert tensor.asked == [(1, 2)]
    np.testing.assert_array_equal(read_rows(ir.tensor(tensor.array), 1, 2), [[2, 3]])
