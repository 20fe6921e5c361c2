import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from tests.graph_passes.harness import as_text, check_pass

X = np.linspace(-1, 1, 2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
ATTENTION = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[b,s,4] x) => (float[b,s,2] q, float[b,s,1] k, float[b,s,1] v)
<float[4,2] wq = {1,2,3,4,5,6,7,8}, float[4,1] wk = {1,0,2,0}, float[4,1] wv = {0,3,0,1}>
{
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
}
"""


def test_fusion_joins_three_projections_of_one_value():
    model = check_pass(
        ATTENTION, FuseSiblingMatMulsPass(), {"MatMul": 3, "Split": 0}, {"MatMul": 1, "Split": 1}, {"x": X}
    )
    (fused,) = [value for name, value in model.graph.initializers.items() if name.endswith(".weight")]
    np.testing.assert_array_equal(fused.const_value.numpy(), [[1, 2, 1, 0], [3, 4, 0, 3], [5, 6, 2, 0], [7, 8, 0, 1]])


def test_fused_weight_gives_any_rows_without_the_others():
    model = ir.from_onnx_text(ATTENTION)
    FuseSiblingMatMulsPass()(model)
    weight = next(v.const_value for n, v in model.graph.initializers.items() if n.endswith(".weight"))
    np.testing.assert_array_equal(weight.rows(1, 3), weight.numpy()[1:3])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("v = MatMul(x, wv)", "v = MatMul(z, wv)\n  z = Neg(x)"), id="another-input"),
        pytest.param(("v = MatMul(x, wv)", "v = MatMul(x, wk)"), id="shared-weight"),
        pytest.param(("v = MatMul(x, wv)", "u = Neg(wv)\n  v = MatMul(x, u)"), id="computed-weight"),
    ],
)
def test_fusion_leaves_near_misses_alone(change):
    lines = ATTENTION.replace(*change)
    if "z = Neg(x)" in lines:  # ONNX wants producers first
        lines = lines.replace("\n  z = Neg(x)", "").replace("  q = MatMul", "  z = Neg(x)\n  q = MatMul")
    model = ir.from_onnx_text(lines)
    text = as_text(model)
    assert not FuseSiblingMatMulsPass()(model).modified
    assert as_text(model) == text


def test_fusion_takes_pairs_when_asked_to():
    text = ATTENTION.replace("v = MatMul(x, wv)", "v = Relu(k)")
    assert not FuseSiblingMatMulsPass()(ir.from_onnx_text(text)).modified
    check_pass(text, FuseSiblingMatMulsPass(minimum=2), {"MatMul": 2}, {"MatMul": 1}, {"x": X})
