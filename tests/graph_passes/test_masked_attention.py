from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.masked_attention import MaskedAttention, match_masked_attention
from dlo_export.graph_passes.find.masked_branch import Mismatch
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from tests.graph_passes import golden_graphs
from tests.graph_passes.harness import as_text

ATTENTION = "model.layers.0.self_attn"


def _node(graph: ir.Graph, output: str) -> ir.Node:
    return next(node for node in graph if node.outputs[0].name == output)


def _constant(graph: ir.Graph, number: float) -> ir.Value:
    value = ir.val("other", const_value=ir.tensor(np.float32(number), name="other"))
    graph.register_initializer(value)
    return value


def _matched(graph: ir.Graph) -> MaskedAttention | Mismatch:
    (layer,) = find_decoder_layers(graph)
    return match_masked_attention(layer)


def test_matcher_tells_the_parts_when_attention_is_masked() -> None:
    masked = _matched(golden_graphs.golden_graph("route_whole_layers").graph)
    assert isinstance(masked, MaskedAttention)
    assert masked.active.name == "model.routers.0.active"
    ops = ["RMSNormalization", "MatMul", "MatMul", "MatMul", "RotaryEmbedding", "RotaryEmbedding"]
    assert [node.op_type for node in masked.projections] == ops
    assert [node.op_type for node in masked.outputs] == ["MatMul"]
    assert masked.hidden is not None
    selects = (*masked.hidden.nodes, masked.select)
    names = [f"{ATTENTION}.{name}" for name in ("active_keys", "active_values", "bias", "masked")]
    assert [node.outputs[0].name for node in selects] == names
    assert not {"Sigmoid", "Concat"} & {node.op_type for node in masked.nodes}, "router and state serve all tokens"


def _optimum() -> ir.Model:
    return ir.load(Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx")


def test_matcher_tells_the_projections_apart_when_attention_is_spelled_out() -> None:
    model = _optimum()
    RouteLayersPass({1: np.ones(32, np.float32)}, kind="attention")(model)
    layer = find_decoder_layers(model.graph)[1]
    masked = match_masked_attention(layer)
    assert isinstance(masked, MaskedAttention)
    assert (masked.attention, masked.hidden, masked.stays) == (None, None, True)
    roles = ["/model/layers.1/self_attn/q_proj/MatMul", "/model/layers.1/self_attn/o_proj/MatMul"]
    assert [node.name for node in (*masked.projections, *masked.outputs)] == roles


def _show_the_scores(graph: ir.Graph) -> None:
    scores = _node(graph, "/model/layers.1/self_attn/Softmax_output_0").outputs[0]
    scores.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(scores)


def _make_values_of_the_query(graph: ir.Graph) -> None:
    values = next(node for node in graph if node.name == "/model/layers.1/self_attn/v_proj/MatMul")
    values.replace_input_with(0, _node(graph, "/model/layers.1/self_attn/q_proj/MatMul_output_0").outputs[0])
    graph.sort()


def _add_the_query(graph: ir.Graph) -> None:
    query = _node(graph, "/model/layers.1/self_attn/q_proj/MatMul_output_0").outputs[0]
    down = next(node for node in graph if node.name == "/model/layers.1/mlp/up_proj/MatMul")
    summed = ir.node("Add", [down.inputs[0], query])
    graph.insert_before(down, summed)
    down.replace_input_with(0, summed.outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_show_the_scores, "of its attention is used elsewhere, by the graph's outputs"),
        (_make_values_of_the_query, "keys or values are computed from what"),
        (_add_the_query, "is used elsewhere, by Add"),
    ],
)
def test_routing_refuses_when_queries_of_zeros_would_show(change: Callable[[ir.Graph], None], reason: str) -> None:
    model = _optimum()
    change(model.graph)
    with pytest.raises(GraphPassError, match=reason):
        RouteLayersPass({1: np.ones(32, np.float32)}, kind="attention")(model)


def test_matcher_tells_the_query_apart_when_skipped_tokens_leave_keys() -> None:
    masked = _matched(golden_graphs.golden_graph("route_attention").graph)
    assert isinstance(masked, MaskedAttention)
    assert masked.hidden is None
    assert masked.source.name == "model.layers.0.input_layernorm"
    assert [node.outputs[0].name for node in masked.projections] == [f"{ATTENTION}.q_proj", f"{ATTENTION}.q_rotary"]
    assert [node.op_type for node in masked.outputs] == ["MatMul", "Mul"]
    assert (masked.scale is not None and masked.scale.name) == "model.routers.0.scale"


@pytest.mark.parametrize("golden", ["route_attention", "lower_attention_to_compaction", "lower_attention_to_if"])
def test_fusion_joins_keys_and_values_only_when_the_query_serves_active_tokens_only(golden: str) -> None:
    model = golden_graphs.golden_graph(golden)
    FuseSiblingMatMulsPass()(model)
    made_by = {value.name: node.op_type for node in model.graph.all_nodes() for value in node.outputs}
    projections = [f"{ATTENTION}.{part}_proj" for part in "qkvo"]
    assert [made_by[name] for name in projections] == ["MatMul", "Split", "Split", "MatMul"]


def test_lowerings_refuse_when_the_query_is_computed_from_several_values() -> None:
    model = golden_graphs.golden_graph("route_attention")
    query, key = _node(model.graph, f"{ATTENTION}.q_rotary"), _node(model.graph, f"{ATTENTION}.k_proj")
    both = ir.node("Concat", [query.inputs[0], key.outputs[0], key.outputs[0]], {"axis": -1}, name="both")
    both.outputs[0].name = "both"
    model.graph.insert_after(key, both)
    query.replace_input_with(0, both.outputs[0])
    model.graph.sort()
    with pytest.raises(GraphPassError, match=r"layer 0: the query of .* is computed from '.*_layernorm', '.*k_proj'"):
        LowerSkipToCompactionPass()(model)


def test_matcher_says_not_masked_when_only_mlps_are() -> None:
    found = _matched(golden_graphs.golden_graph("route_layers").graph)
    assert isinstance(found, Mismatch)
    assert not found.masked


def _keep_other_keys(graph: ir.Graph) -> None:
    _node(graph, f"{ATTENTION}.active_keys").replace_input_with(2, _constant(graph, 1.0))


def _keep_all_values(graph: ir.Graph) -> None:
    attention = _node(graph, f"{ATTENTION}.attention")
    attention.replace_input_with(2, _node(graph, f"{ATTENTION}.active_values").inputs[1])


def _hide_a_little(graph: ir.Graph) -> None:
    _node(graph, f"{ATTENTION}.bias").replace_input_with(2, _constant(graph, -1.0))


def _swap_the_state(graph: ir.Graph) -> None:
    state = _node(graph, "present_active.0")
    past, now = state.inputs
    state.replace_input_with(0, now)
    state.replace_input_with(1, past)


def _show_the_query(graph: ir.Graph) -> None:
    graph.outputs.append(_node(graph, f"{ATTENTION}.q_proj").outputs[0])


def _add_what_is_attended(graph: ir.Graph) -> None:
    _node(graph, f"{ATTENTION}.masked").replace_input_with(2, _constant(graph, 2.0))


NEAR_MISSES: dict[str, tuple[Callable[[ir.Graph], None], str]] = {
    "other_keys": (_keep_other_keys, "skipped tokens are not kept out of the keys"),
    "all_values": (_keep_all_values, "skipped tokens are not kept out of the values"),
    "weak_mask": (_hide_a_little, "skipped tokens are not kept out of the mask"),
    "swapped_state": (_swap_the_state, "skipped tokens are not kept out of the mask"),
    "shown": (_show_the_query, "of the attention branch is used elsewhere, by the graph's outputs"),
    "adds_twos": (_add_what_is_attended, "does not select zero for skipped tokens"),
}


@pytest.mark.parametrize("pass_", [LowerSkipToCompactionPass(), LowerSkipToIfPass()], ids=["compact", "if"])
@pytest.mark.parametrize(("change", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_lowerings_refuse_with_the_reason_when_attention_is_almost_masked(
    change: Callable[[ir.Graph], None], reason: str, pass_: GraphPass
) -> None:
    model = golden_graphs.golden_graph("route_whole_layers")
    change(model.graph)
    before = as_text(model)
    with pytest.raises(GraphPassError, match="layer 0: ") as error:
        pass_(model)
    assert reason in str(error.value)
    assert as_text(model) == before


def test_compaction_refuses_when_no_projection_computes_each_token_by_itself() -> None:
    text = golden_graphs.source_text().replace("<axis: int = -1, epsilon", "<axis: int = 1, epsilon")
    model = ir.from_onnx_text(text)
    RouteLayersPass(golden_graphs.ROUTERS, kind="layer")(model)
    with pytest.raises(GraphPassError, match="layer 0: none of its projections runs on rows"):
        LowerSkipToCompactionPass()(model)


def test_compaction_keeps_the_where_when_more_than_rotation_is_behind_a_projection() -> None:
    text = golden_graphs.source_text().replace(
        '"model.layers.0.self_attn.k_rotary" = RotaryEmbedding',
        '"k_shift" = Add ("model.rotary_emb.cos", "model.rotary_emb.sin")\n'
        '  "k_wide" = Concat <axis: int = 2> ("k_shift", "k_shift")\n'
        '  "model.layers.0.self_attn.k_rotary" = RotaryEmbedding',
    )
    text = text.replace(
        '"model.layers.0.self_attn.k_rotary", "model.layers.0.self_attn.v_proj", "model.attention_mask.bias"',
        '"k_moved", "model.layers.0.self_attn.v_proj", "model.attention_mask.bias"',
    ).replace(
        '  "model.layers.0.self_attn.attention", "present.0.key"',
        '  "k_moved" = Add ("model.layers.0.self_attn.k_rotary", "k_wide")\n'
        '  "model.layers.0.self_attn.attention", "present.0.key"',
    )
    model = ir.from_onnx_text(text)
    RouteLayersPass(golden_graphs.ROUTERS, kind="layer")(model)
    LowerSkipToCompactionPass(branches=False)(model)
    attention = _node(model.graph, f"{ATTENTION}.attention")
    makers = [attention.inputs[index].producer() for index in (1, 2)]
    assert [node.op_type for node in makers if node is not None] == ["Where", "ScatterND"]


@pytest.mark.parametrize(("dtype", "found"), [(ir.DataType.BOOL, "bool"), (None, "unknown type")])
def test_routing_refuses_when_the_mask_is_no_sum(dtype: ir.DataType | None, found: str) -> None:
    text = golden_graphs.source_text().replace(
        '"model.layers.0.self_attn.v_proj", "model.attention_mask.bias"',
        '"model.layers.0.self_attn.v_proj", "model.attention_mask.visible"',
    )
    model = ir.from_onnx_text(text)
    next(n for n in model.graph if n.name == "" and n.op_type == "And").outputs[0].dtype = dtype
    with pytest.raises(
        GraphPassError,
        match=rf"mask 'model\.attention_mask\.visible' of .* is {found}, expected an additive one of float",
    ):
        RouteLayersPass(golden_graphs.ROUTERS, kind="layer")(model)


def test_routing_refuses_when_attention_adds_to_a_cast_of_the_stream() -> None:
    text = golden_graphs.source_text().replace(
        '"model.layers.0.attention_residual" = Add ("model.embed_tokens",',
        '"cast" = Cast <to: int = 1> ("model.embed_tokens")\n  "model.layers.0.attention_residual" = Add ("cast",',
    )
    with pytest.raises(GraphPassError, match=r"layer 0: Add node .* adds to a cast of the stream"):
        RouteLayersPass(golden_graphs.ROUTERS, kind="layer")(ir.from_onnx_text(text))
