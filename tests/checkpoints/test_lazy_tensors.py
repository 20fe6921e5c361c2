"""Chunks of tensors, and tensors compared in chunks."""

import numpy as np
import pytest

from dlo_export.checkpoints import lazy_tensors
from dlo_export.checkpoints.lazy_tensors import CHUNK_BYTES, ArrayTensor, are_equal, rows_at_once


@pytest.mark.parametrize(
    ("rows", "nbytes", "expected"),
    [(4, 4 * CHUNK_BYTES, 1), (8, CHUNK_BYTES, 8), (2, 100 * CHUNK_BYTES, 1), (0, 0, 1)],
)
def test_chunk_is_as_many_rows_as_fit_and_at_least_one(rows, nbytes, expected):
    assert rows_at_once(rows, nbytes) == expected


def test_tensors_are_equal_only_when_type_shape_and_all_values_are(monkeypatch):
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 16)  # a chunk of two rows
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    values[1, 1] = np.nan
    other = values.copy()
    other[4, 0] = -1
    assert are_equal(ArrayTensor(values), ArrayTensor(values.copy()))
    assert not are_equal(ArrayTensor(values), ArrayTensor(other))
    assert not are_equal(ArrayTensor(values), ArrayTensor(values.astype(np.float64)))
    assert not are_equal(ArrayTensor(values), ArrayTensor(values.reshape(2, 5)))
    assert are_equal(ArrayTensor(np.float32(2)), ArrayTensor(np.float32(2)))
