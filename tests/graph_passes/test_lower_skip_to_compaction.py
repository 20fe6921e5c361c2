from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.find.data_flow import is_op, subgraphs_of
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.golden_graphs import ROUTERS, source_text
from tests.graph_passes.graphs import MLP, masked_decoder, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import Arrays, check_pass, check_refused

MIXED = np.array([[True, False, True], [False, False, True]])
ALL, NONE = np.ones((2, 3), bool), np.zeros((2, 3), bool)
BEFORE = {"Where": 1, "Add": 2, "ScatterND": 0, "NonZero": 0}
AFTER = {"Where": 0, "Add": 2, "ScatterND": 1, "NonZero": 1, "GatherND": 1}

DECOMPOSED_NORM = """p = Pow (h, two)
  e = ReduceMean <keepdims = 1> (p, {axes})
  q = Sqrt (e)
  r = Div (h, q)
  n = Mul (r, norm)
  """ + MLP.partition("\n  ")[2]
SCALED = "column2 = Unsqueeze (scale, last)\n  e = Mul (d, column2)\n  m = Where (column, e, zero)"


def _feeds(active: np.ndarray, **more: np.ndarray) -> Arrays:
    return {**tiny_feeds(), "active": active, **more}


@pytest.mark.parametrize("active", [MIXED, ALL, NONE], ids=["mixed", "all", "none"])
def test_compaction_equals_the_mask_when_active_tokens_are(active: np.ndarray) -> None:
    check_pass(masked_decoder(), LowerSkipToCompactionPass(), BEFORE, AFTER, _feeds(active))


@pytest.mark.parametrize("active", [MIXED, NONE], ids=["mixed", "none"])
def test_compaction_gathers_the_scale_when_branch_is_scaled_per_token(active: np.ndarray) -> None:
    text = masked_decoder(select=SCALED, inputs=", float[B,S] scale")
    feeds = _feeds(active, scale=np.arange(6, dtype=np.float32).reshape(2, 3))
    check_pass(text, LowerSkipToCompactionPass(), BEFORE, {**AFTER, "GatherND": 2, "Unsqueeze": 1}, feeds)


@pytest.mark.parametrize(("axes", "unsqueezes"), [("last", 0), ("second", 1)])
@pytest.mark.parametrize("active", [MIXED, NONE], ids=["mixed", "none"])
def test_compaction_keeps_rank_three_only_when_axes_count_from_the_front(
    axes: str, unsqueezes: int, active: np.ndarray
) -> None:
    text = masked_decoder(
        DECOMPOSED_NORM.format(axes=axes), initializers=", float two = {2}, int64[1] second = {2}", opset=18
    ).replace("RMSNormalization (h, norm)", "Identity (h)")
    after = {**AFTER, "Unsqueeze": unsqueezes, "Squeeze": unsqueezes}
    check_pass(text, LowerSkipToCompactionPass(), BEFORE, after, _feeds(active))


def test_compaction_copies_the_cast_when_norm_and_addition_share_it() -> None:
    mlp = "c = Cast <to = 1> (h)\n  " + MLP.replace("(h, norm)", "(c, norm)")
    text = masked_decoder(mlp).replace("Add (h, m)", "Add (c, m)")
    check_pass(text, LowerSkipToCompactionPass(), {**BEFORE, "Cast": 1}, {**AFTER, "Cast": 2, "Add": 1}, _feeds(MIXED))


def test_compaction_keeps_rows_tokens_apart_when_batches_are_ragged() -> None:
    active = np.array([[True, True, True], [False, True, False]])
    check_pass(masked_decoder(), LowerSkipToCompactionPass(), BEFORE, AFTER, _feeds(active))


def _whole_layer(kind: RoutingKind) -> tuple[list[ir.Node], list[ir.Node]]:
    """Nodes that gather and put back in the branch of a compacted layer, in order."""
    model = ir.from_onnx_text(source_text())
    RouteLayersPass(ROUTERS, kind=kind)(model)
    LowerSkipToCompactionPass()(model)
    (branch,) = (
        graph
        for node in model.graph
        for graph in subgraphs_of(node)
        if any(inner.op_type == "NonZero" for inner in graph)
    )
    return [node for node in branch if is_op(node, "GatherND")], [node for node in branch if is_op(node, "ScatterND")]


def test_rows_of_the_stream_are_gathered_and_put_back_once_when_both_blocks_stand_in_a_branch() -> None:
    gathers, scatters = _whole_layer("layer")
    assert [node.inputs[0].name for node in gathers].count("model.embed_tokens") == 1  # type: ignore[union-attr]
    assert len(gathers) == 2, "the stream's rows, and what attention computed"
    assert [node.inputs[0].name for node in scatters].count("model.embed_tokens") == 1  # type: ignore[union-attr]
    assert scatters[-1].inputs[2].producer().op_type == "Add", "of rows that were never put back in between"  # type: ignore[union-attr]


def test_scatter_adds_by_itself_when_no_rows_of_the_stream_are_gathered() -> None:
    gathers, scatters = _whole_layer("attention")
    assert "model.embed_tokens" not in {node.inputs[0].name for node in gathers}  # type: ignore[union-attr]
    assert scatters[-1].attributes.get_string("reduction") == "add"


NEAR_MISSES = {
    "not_routed": (tiny_decoder(), "none of the 1 decoder layers is routed"),
    "selects_one": (
        masked_decoder(select="m = Where (column, d, something)", initializers=", float something = {1}"),
        "does not select zero",
    ),
    "keeps_skipped": (masked_decoder(select="m = Where (column, zero, d)"), "does not select zero"),
    "wrong_axis": (masked_decoder().replace("(active, last)", "(active, first)").replace(
        "float zero", "int64[1] first = {0}, float zero"), "its condition is not Unsqueeze"),
    "mask_of_rank_three": (
        masked_decoder().replace("column = Unsqueeze (active, last)", "column = Identity (active)").replace(
            "bool[B,S]", "bool[B,S,1]"), "its condition is not Unsqueeze"),
    "reads_layer_input": (masked_decoder(MLP.replace("(a, down)", "(b, down)").replace(
        "d = ", "b = Mul (a, xa)\n  d = ").replace("n = ", "xa = MatMul (x, up)\n  n = ")), "not the stream after"),
    "used_elsewhere": (masked_decoder(outputs=", float[B,S,2] d"), "is used elsewhere, by the graph's outputs"),
    "mask_used_elsewhere": (masked_decoder(outputs=", float[B,S,2] m"), "is used elsewhere"),
    "mixes_tokens": (masked_decoder(MLP.replace("a = Sigmoid (u)", "a = Softmax <axis = 1> (u)")),
        "Softmax node '' does not compute each token by itself"),
    "mean_over_tokens": (masked_decoder(MLP.replace("a = Sigmoid (u)", "c = ReduceMean (u, one)\n  a = Add (u, c)")),
        "ReduceMean node '' does not compute each token by itself"),
    "bias_per_token": (masked_decoder(MLP.replace("a = Sigmoid (u)", "a = Add (u, bias)"),
        initializers=", float[3,1] bias = {1,2,3}"), "Add node '' does not compute each token by itself"),
    "old_opset": (masked_decoder(opset=12), "opset 12, expected 13 or newer"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_compaction_refuses_with_the_reason_when_graph_is_no_masked_mlp(text: str, reason: str) -> None:
    check_refused(text, LowerSkipToCompactionPass(), reason)
