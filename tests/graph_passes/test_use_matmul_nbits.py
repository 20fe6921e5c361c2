"""Products with weights that a node dequantises, as one operator, so that a branch can leave them out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.use_matmul_nbits import UseMatMulNBitsPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from tests.graph_passes.graphs import masked_decoder, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import as_text, check_idempotence, check_pass, check_refused

CODES = """, int8[2,3] codes = {64, -64, 127, 32, 96, -128}, float[1,3] scales = {0.015625, 0.0625, 0.03125},
 int8[1,3] points = {0, 8, -4}"""
DEQUANTIZED = """n = RMSNormalization (h, norm)
  w = DequantizeLinear <axis = 0, block_size = 16> (codes, scales, points)
  u = MatMul (n, w)
  a = Sigmoid (u)
  d = MatMul (a, down)"""
# ONNX Runtime fuses neither of two that share their scales.
SHARED = """n = RMSNormalization (h, norm)
  w = DequantizeLinear <axis = 0, block_size = 16> (codes, scales, points)
  w2 = DequantizeLinear <axis = 0, block_size = 16> (codes2, scales, points)
  p = MatMul (n, w)
  q = MatMul (n, w2)
  u = Add (p, q)
  a = Sigmoid (u)
  d = MatMul (a, down)"""
OTHER_CODES = ", int8[2,3] codes2 = {1, 2, 3, 4, 5, 6}"
ACTIVE = np.array([[True, False, True], [False, False, True]])


def test_product_and_dequantisation_are_one_when_a_masked_mlp_has_them() -> None:
    text = masked_decoder(DEQUANTIZED, initializers=CODES)
    before, after = {"DequantizeLinear": 1, "MatMul": 2}, {"DequantizeLinear": 0, "MatMul": 1, "MatMulNBits": 1}
    pass_ = UseMatMulNBitsPass()
    # Eight bits of the largest activation, which the operator rounds to.
    model = check_pass(
        text, pass_, {**before, "MatMulNBits": 0}, after, tiny_feeds() | {"active": ACTIVE}, tolerance=0.05
    )
    check_idempotence(model, pass_)
    assert LowerSkipToIfPass()(model).modified


@pytest.mark.parametrize(
    "text",
    [
        tiny_decoder(DEQUANTIZED, initializers=CODES),
        masked_decoder(DEQUANTIZED.replace("block_size = 16", "block_size = 24"), initializers=CODES),
        masked_decoder(SHARED, initializers=CODES + OTHER_CODES),
    ],
    ids=["nothing skips it", "the operator has no such blocks", "two nodes read its scales"],
)
def test_weights_are_left_alone_when(text: str) -> None:
    model = ir.from_onnx_text(text)
    before = as_text(model)
    assert not UseMatMulNBitsPass()(model).modified
    assert as_text(model) == before


def test_branches_are_refused_when_a_weight_is_still_dequantised_outside() -> None:
    text = masked_decoder(DEQUANTIZED, initializers=CODES)
    check_refused(text, LowerSkipToIfPass(), "dequantises a weight, which no branch can leave out")
