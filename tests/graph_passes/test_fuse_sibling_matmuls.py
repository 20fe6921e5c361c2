from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from tests.graph_passes.harness import check_pass

TEXT = """<ir_version: 11, opset_import: ["" : 23]>
siblings (float[N,2] x, float[N,2] other, float[2,1] given) => (float[N,1] q, float[N,2] k, float[N,1] v)
<float[2,1] wq = {1,2}, float[2,2] wk = {3,4,5,6}, float[2,1] wv = {7,8}>
{ q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv) }"""
FEEDS = {
    "x": np.array([[1, 2], [-3, 0.5]], np.float32),
    "other": np.array([[4, 1], [2, 0]], np.float32),
    "given": np.ones((2, 1), np.float32),
}


def test_siblings_become_one_matmul_when_they_read_the_same_value() -> None:
    check_pass(TEXT, FuseSiblingMatMulsPass(), {"MatMul": 3, "Split": 0}, {"MatMul": 1, "Split": 1}, FEEDS)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("MatMul (x, wv)", "MatMul (other, wv)"),
        TEXT.replace("MatMul (x, wv)", "MatMul (x, given)"),
        TEXT.replace("MatMul (x, wv)", "MatMul (x, wq)"),
        TEXT.replace("v = MatMul (x, wv)", "t = MatMul (x, wk)\n  u = MatMul (t, wq)\n  v = Identity (u)"),
    ],
    ids=["another_value", "weight_not_constant", "weight_shared", "chained"],
)
def test_matmuls_stay_apart_when_they_are_no_group_of_three(text: str) -> None:
    before = ir.from_onnx_text(text)
    matmuls = {"MatMul": sum(node.op_type == "MatMul" for node in before.graph), "Split": 0}
    check_pass(text, FuseSiblingMatMulsPass(), matmuls, matmuls, FEEDS)
