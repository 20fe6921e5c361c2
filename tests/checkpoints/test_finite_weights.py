"""NaN and infinity are found in every float type, wherever they stand."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dlo_export.checkpoints.finite_weights import NonFiniteWeightError, all_finite, check_finite, finite_tensors
from dlo_export.checkpoints.lazy_tensors import ArrayTensor

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_largest_numbers_and_zeros_are_finite(dtype):
    limits = ml_dtypes.finfo(dtype)
    values = np.array([limits.max, limits.min, limits.smallest_subnormal, 0.0, -0.0], dtype)
    assert all_finite(values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, (1 << 16) - 1, 1 << 16, (1 << 17) + 4])
def test_one_value_is_found_wherever_it_stands(dtype, value, place):
    values = np.ones((1 << 17) + 5, dtype)
    values[place] = value
    assert not all_finite(values)
    with pytest.raises(NonFiniteWeightError, match=rf"model\.w\[{place}\]"):
        check_finite(values, "model.w", Path("file"))


def test_strided_and_integer_arrays_are_looked_at_too():
    values = np.ones((4, 6), np.float32)
    values[2, 3] = np.inf
    assert not all_finite(values.T)
    assert all_finite(values[:, ::2])
    assert all_finite(np.array([2**31 - 1], np.int32))


def test_tensor_names_the_row_when_rows_are_read():
    array = np.ones((8, 2), np.float32)
    array[6, 1] = np.nan
    tensor = finite_tensors({"model.w": ArrayTensor(array)}, Path("file"))["model.w"]
    assert np.array_equal(tensor.rows(0, 6), array[:6])
    with pytest.raises(NonFiniteWeightError, match=r"model\.w\[6, 1\] is nan"):
        tensor.rows(5, 8)
    with pytest.raises(NonFiniteWeightError, match=r"model\.w\[6, 1\] is nan"):
        tensor.numpy()


def test_rows_are_refused_every_time_and_looked_at_once_when_they_are_finite():
    array = np.ones((4, 2), np.float32)
    tensor = finite_tensors({"model.w": ArrayTensor(array)}, Path("file"))["model.w"]
    tensor.rows(0, 2)
    array[:] = np.nan
    assert np.isnan(tensor.rows(0, 2)).all(), "it was looked at before"
    for _ in range(2):
        with pytest.raises(NonFiniteWeightError, match=r"model\.w\[2, 0\] is nan"):
            tensor.rows(2, 4)
