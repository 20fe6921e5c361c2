"""Rows and parts of a GGUF tensor are those of the whole one, read alone."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.gguf_tensor import GgufTensor

ROWS, COLUMNS, OFFSET = 6, 96, 32


@pytest.fixture(params=["F32", "F16", "Q8_0", "Q4_1"])
def stored(request, tmp_path):
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    kind = GGMLQuantizationType[request.param]
    data = quants.quantize(values, kind)
    path = tmp_path / "tensor"
    path.write_bytes(bytes(OFFSET) + data.tobytes())
    expected = quants.dequantize(data, kind) if request.param.startswith("Q") else data.reshape(ROWS, COLUMNS)
    file = MappedFile(path)
    yield request.param, file, expected, data.nbytes
    file.close()


@pytest.mark.parametrize("order", [None, np.array([3, 0, 5, 1, 4, 2])])
def test_rows_and_parts_are_those_of_the_whole_tensor(stored, order):
    kind, file, expected, stored_bytes = stored
    tensor = GgufTensor((ROWS, COLUMNS), file, OFFSET, kind, row_order=order)
    whole = expected if order is None else expected[order]
    assert np.array_equal(tensor.numpy(), whole)
    assert tensor.numpy().dtype == tensor.dtype == expected.dtype
    assert np.array_equal(tensor.rows(1, 4), whole[1:4])
    # From the middle of one block to the middle of another.
    assert np.array_equal(tensor.part(slice(2, 5), slice(17, 81)), whole[2:5, 17:81])
    assert tensor.nbytes == whole.nbytes
    assert tensor.stored_nbytes == stored_bytes
