from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.graph_passes.cache.grow_cache_outside_attention import GrowCacheOutsideAttentionPass
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.compute_norms_in_float32 import ComputeNormsInFloat32Pass
from dlo_export.graph_passes.cleanup.keep_last_logits import KeepLastLogitsPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_plugin import LowerSkipToPluginPass
from dlo_export.graph_passes.lowerings.lower_skip_to_topk import LowerSkipToTopKPass
from dlo_export.graph_passes.routing.expose_hidden_states import ExposeHiddenStatesPass
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS, reference_function
from tests.graph_passes import golden_graphs
from tests.graph_passes.graphs import MLP, masked_decoder, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import Arrays, check_idempotence, check_pass, run_model
from tests.graph_passes.plugin_schemas import register_schemas

MIXED = np.array([[True, False, True], [False, False, True]])
ALL, NONE = np.ones((2, 3), bool), np.zeros((2, 3), bool)
SCALED = "column2 = Unsqueeze (scale, last)\n  e = Mul (d, column2)\n  m = Where (column, e, zero)"
# What the plugins compute, on the tiny decoder's weights.
GATED = """n = RMSNormalization (h, norm)
  g = MatMul (n, up)
  u = MatMul (n, up)
  s = Sigmoid (g)
  t = Mul (g, s)
  a = Mul (t, u)
  d = MatMul (a, down)"""
ATTENTION = """<ir_version: 11, opset_import: ["" : 23]>
tiny (int64[B,S] input_ids, float[B,S,4] q, float[B,S,2] k, float[B,1,S,T] mask,
      float[B,1,P,2] "past_key_values.0.key", float[B,1,P,2] "past_key_values.0.value")
  => (float[B,S,4] y, float[B,1,T,2] "present.0.key", float[B,1,T,2] "present.0.value")
{{ y, "present.0.key", "present.0.value" = Attention <q_num_heads = 2, kv_num_heads = 1{attributes}>
     ({operands}, mask, "past_key_values.0.key", "past_key_values.0.value") }}"""


def _feeds(active: np.ndarray, **more: np.ndarray) -> Arrays:
    return {**tiny_feeds(), "active": active, **more}


@pytest.mark.parametrize("active", [MIXED, ALL, NONE], ids=["mixed", "all", "none"])
@pytest.mark.parametrize("max_tokens", [6, 3840, 3841, 9000])
def test_topk_equals_the_mask_when_active_tokens_are(active: np.ndarray, max_tokens: int) -> None:
    chunks = -(-max_tokens // 3840)
    after = {
        "Where": 0,
        "TopK": chunks,
        "Slice": chunks + (chunks > 1) * chunks,
        "ScatterND": 1,
        "Add": 2 + (chunks > 1) * chunks,
    }
    check_pass(masked_decoder(), LowerSkipToTopKPass(max_tokens), {"Where": 1, "Add": 2}, after, _feeds(active))


@pytest.mark.parametrize("active", [MIXED, ALL, NONE], ids=["mixed", "all", "none"])
def test_topk_is_never_asked_for_nothing(active: np.ndarray) -> None:
    """TensorRT's TopK takes a positive K only."""
    model = ir.from_onnx_text(masked_decoder())
    LowerSkipToTopKPass(6)(model)
    (top,) = [node for node in model.graph if node.op_type == "TopK"]
    count = next(value for node in model.graph for value in node.outputs if value.name == "model.routers.0.count")
    model.graph.outputs.extend([top.inputs[1], count])
    outputs = run_model(model, _feeds(active))
    assert outputs["model.routers.0.k"] == max(active.sum(), 1)
    assert outputs["model.routers.0.count"] == active.sum()


@pytest.mark.parametrize("active", [MIXED, NONE], ids=["mixed", "none"])
def test_topk_gathers_the_scale_when_branch_is_scaled_per_token(active: np.ndarray) -> None:
    text = masked_decoder(select=SCALED, inputs=", float[B,S] scale")
    feeds = _feeds(active, scale=np.arange(6, dtype=np.float32).reshape(2, 3))
    check_pass(text, LowerSkipToTopKPass(6), {"Where": 1}, {"Where": 0, "Gather": 3}, feeds)


@pytest.mark.parametrize("pass_", [LowerSkipToTopKPass(6), LowerSkipToPluginPass()], ids=lambda p: type(p).__name__)
def test_layers_are_found_in_lowered_graphs(pass_: ir.passes.InPlacePass) -> None:
    model = ir.from_onnx_text(golden_graphs.source_text())
    golden_graphs.GOLDENS["route_layers"][0](model)
    (before,) = find_decoder_layers(model.graph)
    name = before.output.name
    pass_(model)
    (after,) = find_decoder_layers(model.graph)
    assert after.mlp.stream_in is before.mlp.stream_in
    assert after.output.name == name
    assert after.mlp.branch is not before.mlp.branch
    ExposeHiddenStatesPass()(model)
    assert model.graph.outputs[-1].name == "hidden.0"


def test_topk_refuses_with_the_reason_when_nothing_is_routed() -> None:
    with pytest.raises(GraphPassError, match="LowerSkipToTopKPass: none of the 1 decoder layers is routed"):
        LowerSkipToTopKPass(6)(ir.from_onnx_text(tiny_decoder()))


@pytest.mark.parametrize("select", ["plain", "per-token", "constant"])
@pytest.mark.parametrize("active", [MIXED, ALL, NONE], ids=["mixed", "all", "none"])
def test_plugins_equal_the_mask_when_mlp_is_gated(select: str, active: np.ndarray) -> None:
    text, feeds = masked_decoder(GATED), _feeds(active)
    if select == "per-token":
        text = masked_decoder(GATED, SCALED, inputs=", float[B,S] scale")
        feeds = _feeds(active, scale=np.arange(1, 7, dtype=np.float32).reshape(2, 3))
    if select == "constant":
        constant = "e = Mul (d, half)\n  m = Where (column, e, zero)"
        text = masked_decoder(GATED, constant, initializers=", float half = {0.5}")
    model = ir.from_onnx_text(text)
    expected = run_model(model, feeds)
    assert LowerSkipToPluginPass()(model).modified
    assert [node.op_type for node in model.graph if node.domain == "dlo"] == ["SkipGateUp", "SkipDown"]
    check_idempotence(model, LowerSkipToPluginPass())
    register_schemas()
    for op in PLUGIN_OPS.values():
        function = reference_function(op)
        model.functions[function.identifier()] = function
    outputs = run_model(model, feeds)
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name], array, rtol=0, atol=1e-6, err_msg=name)


NEAR_MISSES = {
    "not_gated": (masked_decoder(), "does not read a product"),
    "bias": (masked_decoder(GATED + "\n  f = Add (d, norm)", "m = Where (column, f, zero)"), "its branch ends in Add"),
    "gate_bias": (
        masked_decoder(GATED.replace("g = MatMul (n, up)", "g0 = MatMul (n, up)\n  g = Add (g0, bias)"),
                       initializers=", float[3] bias = {1,2,3}"), "does not multiply silu(x·gate) with x·up"),
    "other_sigmoid": (masked_decoder(GATED.replace("t = Mul (g, s)", "t = Mul (u, s)")),
                      "does not multiply silu(x·gate) with x·up"),
    "computed_weight": (
        masked_decoder(GATED.replace("d = MatMul (a, down)", "w = Transpose (down2)\n  d = MatMul (a, w)"),
                       initializers=", float[2,3] down2 = {1,2,3,4,5,6}"), "is not stored as MatMul reads it"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_plugins_refuse_with_the_reason_when_mlp_is_another(text: str, reason: str) -> None:
    with pytest.raises(GraphPassError, match="LowerSkipToPluginPass: layer 0: ") as error:
        LowerSkipToPluginPass()(ir.from_onnx_text(text))
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "pass_", [UseStaticCachePass(8), GrowCacheOutsideAttentionPass()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(
    ("attributes", "operands", "reason"),
    [
        (", is_causal = 1", "q, k, k", "sets one of is_causal"),
        (", softcap = 2.0", "q, k, k", "sets one of is_causal"),
    ],
)
def test_cache_passes_refuse_with_the_reason_when_attention_does_more_than_mask(
    pass_: ir.passes.InPlacePass, attributes: str, operands: str, reason: str
) -> None:
    model = ir.from_onnx_text(ATTENTION.format(attributes=attributes, operands=operands))
    with pytest.raises(GraphPassError, match=f"{type(pass_).__name__}: Attention node") as error:
        pass_(model)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "pass_", [UseStaticCachePass(8), GrowCacheOutsideAttentionPass()], ids=lambda p: type(p).__name__
)
def test_cache_passes_refuse_with_the_reason_when_attention_is_decomposed(pass_: ir.passes.InPlacePass) -> None:
    with pytest.raises(GraphPassError, match="the graph has no Attention node"):
        pass_(ir.from_onnx_text(tiny_decoder()))


def test_growing_cache_computes_the_same_outside_attention() -> None:
    text = ATTENTION.format(attributes=", scale = 0.3", operands="q, k, k")
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": np.zeros((2, 3), np.int64),
        "q": rng.standard_normal((2, 3, 4), np.float32),
        "k": rng.standard_normal((2, 3, 2), np.float32),
        "mask": rng.standard_normal((2, 1, 3, 7), np.float32),
        "past_key_values.0.key": rng.standard_normal((2, 1, 4, 2), np.float32),
        "past_key_values.0.value": rng.standard_normal((2, 1, 4, 2), np.float32),
    }
    after = {"Attention": 1, "Concat": 2, "Transpose": 4}
    check_pass(
        text.replace("int64[B,S] input_ids", "int64[B,S] input_ids"),
        GrowCacheOutsideAttentionPass(),
        {"Attention": 1},
        after,
        feeds,
    )


def test_last_logits_are_the_last_columns_when_cache_grows() -> None:
    model = ir.from_onnx_text(golden_graphs.source_text())
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {value.name: _zeros(value) for value in session.get_inputs()}
    feeds |= {"input_ids": np.array([[1, 2, 0]]), "attention_mask": np.ones((1, 3), np.int64)}
    feeds["position_ids"] = np.array([[0, 1, 2]])
    all_logits = session.run(["logits"], feeds)[0]
    KeepLastLogitsPass()(model)
    last = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(["logits"], feeds)[0]
    np.testing.assert_allclose(last, all_logits[:, -1:], rtol=0, atol=1e-6)


def _zeros(value: ort.NodeArg) -> np.ndarray:
    """An input of one sequence without cached tokens."""
    return np.zeros([size if isinstance(size, int) else int(size == "batch") for size in value.shape], np.float32)


def test_norms_compute_in_float32_when_stream_is_sixteen_bit() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
      tiny (float16[B,2] x) => (float16[B,2] y) <float16[2] scale = {15360, 16384}>
      { y = RMSNormalization (x, scale) }"""
    feeds = {"x": np.array([[3000, 4000], [1, 2]], np.float16)}  # its squares are no float16
    before, after = {"Cast": 0, "RMSNormalization": 1}, {"Cast": 3, "RMSNormalization": 1}
    model = check_pass(text, ComputeNormsInFloat32Pass(), before, after, feeds, tolerance=2e-3)
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    assert {value.dtype for value in (*norm.inputs, *norm.outputs)} == {ir.DataType.FLOAT}


def test_norms_are_left_alone_when_stream_is_float32() -> None:
    assert not ComputeNormsInFloat32Pass()(ir.from_onnx_text(tiny_decoder(MLP))).modified
