"""Weights from outside take the place of a projection's, in its layout and type."""

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.depth.injected_weights import checkpoint_shape, given_weight
from dlo_export.graph_passes.find.projections import Projection


def projection(layout):
    stored = np.zeros((2, 3) if layout == "in_out" else (3, 2), np.float16)
    weight = ir.Value(name="w", const_value=ir.tensor(stored))
    return Projection("mlp.up_proj.weight", weight, layout, ir.node("MatMul", [None, weight]), 1)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_weight_is_laid_out_and_cast_as_the_projection(layout):
    like = projection(layout)
    given = np.arange(6, dtype=np.float32).reshape(3, 2)  # [out, in]
    assert checkpoint_shape(like) == given.shape
    weight = given_weight("new", like, given)
    assert weight.name == "new"
    assert weight.dtype == ir.DataType.FLOAT16
    assert np.array_equal(weight.numpy(), given.T if layout == "in_out" else given)
