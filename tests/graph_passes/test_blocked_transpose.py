"""Transposed copies, block by block."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from dlo_export.graph_passes.blocked_transpose import transpose_into

TYPES = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (256, 512), (257, 513), (700, 3), (0, 4), (4, 0)])
@pytest.mark.parametrize("found", TYPES)
def test_matrix_is_transposed_when_it_is_of(shape, found):
    by_rows = np.random.default_rng(0).standard_normal((shape[0], shape[1] + 5)).astype(found)[:, 2 : 2 + shape[1]]
    for matrix, wanted in itertools.product((by_rows, np.asfortranarray(by_rows)), TYPES):
        everything = np.zeros((shape[1], shape[0] + 3), wanted)
        transpose_into(everything[:, 1 : 1 + shape[0]], matrix)
        expected = np.zeros_like(everything)
        expected[:, 1 : 1 + shape[0]] = matrix.T.astype(wanted)
        assert everything.tobytes() == expected.tobytes()
