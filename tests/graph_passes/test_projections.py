"""Weights that no role names: a layer with them is not copied, and not taken for a Llama's."""

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass, LayerInjection
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.linear_flow import LinearFlow
from tests.graph_passes import golden_graphs

ATTENTION = "model.layers.0.self_attn"


def _model(initializers: str, nodes: str, query: str) -> ir.Model:
    """The one-layer Llama whose rotary embedding of queries reads another value."""
    text = golden_graphs.source_text()
    rotary = f'("{ATTENTION}.q_proj", "model.rotary_emb.cos", "model.rotary_emb.sin")'
    assert text.count(rotary) == 1
    text = text.replace(rotary, rotary.replace(f'"{ATTENTION}.q_proj"', query))
    text = text.replace('  float[4] "model.layers.0.input_layernorm.weight"', f"  {initializers},\n\\g", 1)
    text = text.replace("\\g", '  float[4] "model.layers.0.input_layernorm.weight"')
    projection = next(line for line in text.splitlines() if line.strip().startswith(f'"{ATTENTION}.q_proj" ='))
    return ir.from_onnx_text(text.replace(projection, f"{projection}\n  {nodes}"))


UNNAMED = {
    "norm of queries": (
        "float[4] q_norm = {1,2,3,4}",
        f'query = RMSNormalization <axis: int = -1> ("{ATTENTION}.q_proj", q_norm)',
        "reads weight 'q_norm' [4], which has no role",
    ),
    "prepared": (
        "float16[4] q_scale = {1,2,3,4}",
        f'scale = Cast <to: int = 1> (q_scale)\n  query = Mul (scale, "{ATTENTION}.q_proj")',
        "reads weight 'q_scale' [4], which has no role",
    ),
}


@pytest.mark.parametrize(("initializers", "nodes", "reason"), UNNAMED.values(), ids=UNNAMED)
def test_projections_refuse_by_name_when_a_weight_has_no_role(initializers: str, nodes: str, reason: str) -> None:
    model = _model(initializers, nodes, "query")
    (layer,) = find_decoder_layers(model.graph)
    with pytest.raises(GraphPassError, match="projections of layer 0: ") as error:
        _ = layer.projections
    assert reason in str(error.value)
    with pytest.raises(GraphPassError, match="which has no role in a layer"):
        InjectLayersPass((LayerInjection(1, 0, weights={}),))(model)


def test_projections_are_found_when_a_table_is_cut_to_the_sequence() -> None:
    # Exporters of older models keep cosines in each layer and cut them to the length of what they turn.
    nodes = f"""length = Shape <start: int = 1, end: int = 2> ("{ATTENTION}.q_proj")
  rows = Slice (table, no_rows, length, first_axis)
  total = ReduceSum <keepdims: int = 0> (rows)
  query = Mul ("{ATTENTION}.q_proj", total)"""
    initializers = (
        "float[8,2] table = {" + ",".join("1" * 16) + "},\n  int64[1] no_rows = {0}, int64[1] first_axis = {0}"
    )
    (layer,) = find_decoder_layers(_model(initializers, nodes, "query").graph)
    assert layer.projections["q_proj"].tensor == "self_attn.q_proj.weight"


def test_projections_are_found_when_rotary_tables_are_constants() -> None:
    nodes = f'query = RotaryEmbedding <num_heads: int = 2> ("{ATTENTION}.q_proj", cosines, sines, position_ids)'
    initializers = "float[3,1] cosines = {1,1,1},\n  float[3,1] sines = {0,0,0}"
    (layer,) = find_decoder_layers(_model(initializers, nodes, "query").graph)
    assert layer.projections["q_proj"].tensor == "self_attn.q_proj.weight"


def test_columns_are_told_apart_when_a_gemm_takes_all_tokens_in_one_axis() -> None:
    # As simplifiers write a packed product and its bias.
    weights = ",".join("1" * 32)
    text = f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
decoder (float[1,t,4] x, int64[2] tokens, float[1,1,p,2] past_k, float[1,1,p,2] past_v, int32[1] lengths, int32 total)
  => (float[1,t,4] y, float[1,1,n,2] key, float[1,1,n,2] value)
  <float[4,8] weight = {{{weights}}},
   float[8] bias = {{1,1,1,1,1,1,1,1}}, int64[2] rows = {{-1,4}}, int64[1] width = {{8}}> {{
  flat = Reshape (x, rows)
  product = Gemm (flat, weight, bias)
  shape = Concat <axis: int = 0> (tokens, width)
  packed = Reshape (product, shape)
  y, key, value = com.microsoft.GroupQueryAttention <num_heads: int = 2, kv_num_heads: int = 1>
    (packed, "", "", past_k, past_v, lengths, total)
}}"""
    graph = ir.from_onnx_text(text).graph
    flow = LinearFlow(graph)
    keys, values = (flow.of(output) for output in graph.outputs[1:])
    assert [(part.start, part.stop) for part in (*keys, *values)] == [(4, 6), (6, 8)]
    assert [(part.start, part.stop) for part in flow.first_without(keys | values)] == [(0, 4)]
