"""Bodies of the dlo operators, for runtimes without plugins."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dlo_export.graph_passes.lowerings.add_plugin_functions import AddPluginFunctionsPass

TEXT = """<ir_version: 11, opset_import: ["" : 23, "dlo" : 1]>
skipping (float[B,S,3] gated, float[B,S] scale, float[3,2] w, float[B,S,2] h) => (float[B,S,2] y)
{ y = dlo.SkipDown (gated, scale, w, h) }"""


def test_plain_runtime_computes_the_operator_when_its_body_is_added():
    model = ir.from_onnx_text(TEXT)
    assert AddPluginFunctionsPass()(model).modified
    assert [node.op_type for node in model.graph] == ["SkipDown"]
    rng = np.random.default_rng(0)
    feeds = {
        "gated": rng.standard_normal((1, 4, 3)).astype(np.float32),
        "scale": np.array([[0.0, 2.0, -0.0, 0.5]], np.float32),
        "w": rng.standard_normal((3, 2)).astype(np.float32),
        "h": rng.standard_normal((1, 4, 2)).astype(np.float32),
    }
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feeds)
    expected = feeds["h"] + feeds["scale"][..., None] * (feeds["gated"] @ feeds["w"])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_graph_without_the_operators_is_left_alone():
    model = ir.from_onnx_text(TEXT.replace("dlo.SkipDown (gated, scale, w, h)", "Identity (h)"))
    assert not AddPluginFunctionsPass()(model).modified
    assert not model.functions


def test_operator_of_another_domain_gets_no_body_when_it_has_the_name():
    model = ir.from_onnx_text(TEXT.replace('"dlo" : 1', '"other" : 1').replace("dlo.SkipDown", "other.SkipDown"))
    assert not AddPluginFunctionsPass()(model).modified
    assert not model.functions
