"""Fused norms come apart for the passes on layers, and are fused again for who runs the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.cleanup.skip_norms import FUSED
from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.layer_checks import eager_branches
from tests.graph_passes.graphs import tiny_feeds
from tests.graph_passes.harness import run_model
from tests.graph_passes.test_split_skip_norms import _fused

_BETWEEN = _fused().replace(
    "y = Add (h, d)", "normed, m2, v2, y = com.microsoft." + FUSED + " <epsilon = 0.1> (h, d, norm)"
)
_BETWEEN = _BETWEEN.replace("{", "{{").replace("}", "}}").replace("logits = Identity (y)", "{behind}")


def _between_norms(behind: str) -> ir.Model:
    """A layer with a fused norm on both sides of its MLP."""
    return ir.from_onnx_text(_BETWEEN.format(behind=behind))


def _join_routed(model: ir.Model, lowering: LoweringPass | None, *, threshold: float = 0.5, join: bool = True) -> None:
    """Splits the norms, routes the layer, lowers it and joins the norms again."""
    SplitSkipNormsPass()(model)
    RouteLayersPass({0: np.array([1.0, -1.0])}, thresholds={0: threshold})(model)
    if lowering is not None:
        lowering(model)
    if join:
        assert JoinSkipNormsPass(around_routed=True)(model).modified
    remove_unused(model.graph)


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("opset", [22, 23])
def test_joined_graph_is_the_one_that_was_split(opset: int) -> None:
    before = ir.from_onnx_text(_fused(opset=opset))
    model = ir.from_onnx_text(_fused(opset=opset))
    SplitSkipNormsPass()(model)
    assert JoinSkipNormsPass()(model).modified
    assert _ops(model) == _ops(before)
    fused = {node.op_type: node for node in model.graph}["SkipSimplifiedLayerNormalization"]
    assert [value and value.name for value in fused.inputs] == ["x", "mixed", "norm"]
    assert [fused.outputs[index].name for index in (0, 3)] == ["n", "h"]
    assert fused.attributes.get_float("epsilon") == pytest.approx(0.1)
    for name, found in run_model(model, tiny_feeds()).items():
        np.testing.assert_array_equal(found, run_model(before, tiny_feeds())[name])


@pytest.mark.parametrize(
    "lowering",
    [None, LowerSkipToIfPass(reduce_bool=True), LowerSkipToCompactionPass()],
    ids=["masked", "if", "compact"],
)
@pytest.mark.parametrize("behind", ["logits = Identity (normed)", "logits = Mul (normed, y)"], ids=["last", "not_last"])
def test_routed_graph_is_the_untouched_one_when_all_tokens_are_active(
    lowering: LoweringPass | None, behind: str
) -> None:
    before, model = _between_norms(behind), _between_norms(behind)
    _join_routed(model, lowering, threshold=1e-9)
    fused = [node for node in model.graph.all_nodes() if node.op_type == FUSED]
    branches = isinstance(lowering, LowerSkipToIfPass)
    assert len(fused) == (3 if branches else 2), "as many as before in a step, and one in a step that skips"
    assert not {node.op_type for node in model.graph.all_nodes()} & {"Add", "RMSNormalization"}
    (wanted, _, _), (found, *_) = run_model(before, tiny_feeds()).values(), run_model(model, tiny_feeds()).values()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("lowering", [LowerSkipToIfPass(), LowerSkipToCompactionPass()], ids=["if", "compact"])
@pytest.mark.parametrize("behind", ["logits = Identity (normed)", "logits = Mul (normed, y)"], ids=["last", "not_last"])
def test_lowered_graph_equals_the_mask_when_the_same_tokens_are_active(lowering: LoweringPass, behind: str) -> None:
    masked, lowered = _between_norms(behind), _between_norms(behind)
    _join_routed(masked, None)
    _join_routed(lowered, lowering)
    for feeds in (tiny_feeds(), tiny_feeds(1, 1), {**tiny_feeds(1, 1), "ids": np.array([[2]])}):
        wanted = run_model(masked, feeds)
        for name, found in run_model(lowered, feeds).items():
            np.testing.assert_array_equal(found, wanted[name])


@pytest.mark.parametrize("behind", ["logits = Identity (normed)", "logits = Mul (normed, y)"], ids=["last", "not_last"])
def test_branches_come_apart_again_when_they_were_joined_and_saved(behind: str) -> None:
    model, apart = _between_norms(behind), _between_norms(behind)
    _join_routed(model, LowerSkipToIfPass())
    _join_routed(apart, LowerSkipToIfPass(), join=False)
    saved = ir.from_proto(ir.to_proto(model))
    assert SplitSkipNormsPass()(saved).modified
    assert FUSED not in {node.op_type for node in saved.graph.all_nodes()}
    assert sorted(node.op_type for node in saved.graph.all_nodes()) == sorted(
        node.op_type for node in apart.graph.all_nodes()
    )
    (layer,) = layers = find_decoder_layers(saved.graph)
    assert layer.mlp.conditional is not None
    assert not list(eager_branches(saved.graph, layers))
    for name, found in run_model(saved, tiny_feeds()).items():
        np.testing.assert_array_equal(found, run_model(apart, tiny_feeds())[name])


def test_compacted_graph_is_the_untouched_one_when_its_rows_are_a_batch_of_one() -> None:
    text = _BETWEEN.format(behind="logits = Identity (normed)")
    text = text.replace("a = Sigmoid (u)", "a = Mul (u, leading)")  # a constant of three dimensions
    text = text.replace(", float[2] offset", ", float[1,1,1] leading = {0.5}, float[2] offset")
    assert text.count("leading") == 2
    before, model = ir.from_onnx_text(text), ir.from_onnx_text(text)
    _join_routed(model, LowerSkipToCompactionPass(), threshold=1e-9)
    ops = _ops(model)
    assert "Unsqueeze" in ops
    assert [ops.count(op) for op in (FUSED, "RMSNormalization")] == [2, 0]
    wanted, found = run_model(before, tiny_feeds()), run_model(model, tiny_feeds())
    np.testing.assert_array_equal(found["logits"], wanted["logits"])


def test_rows_come_apart_again_when_norms_were_joined_around_them_and_saved() -> None:
    model = _between_norms("logits = Mul (normed, y)")
    _join_routed(model, LowerSkipToCompactionPass())
    saved = ir.from_proto(ir.to_proto(model))
    assert SplitSkipNormsPass()(saved).modified
    (layer,) = find_decoder_layers(saved.graph)
    assert (layer.mlp.add.op_type, layer.mlp.branch.producer().op_type) == ("Add", "ScatterND")
    joined = JoinSkipNormsPass(around_routed=True)(saved).model
    assert sorted(_ops(joined)) == sorted(_ops(model))
    for name, found in run_model(joined, tiny_feeds()).items():
        np.testing.assert_array_equal(found, run_model(model, tiny_feeds())[name])


@pytest.mark.parametrize(
    ("read", "fused", "alone"), [("h", 2, 1), ("y", 1, 2)], ids=["in_front_of_the_rows", "behind_them"]
)
def test_norm_of_rows_stays_where_it_is_when_two_norms_read_the_stream(read: str, fused: int, alone: int) -> None:
    behind = f"again = RMSNormalization ({read}, norm)\nlogits = Mul (normed, again)"
    before, model = _between_norms(behind), _between_norms(behind)
    _join_routed(model, LowerSkipToCompactionPass(), threshold=1e-9)
    assert [_ops(model).count(op) for op in (FUSED, "RMSNormalization")] == [fused, alone]
    wanted, found = run_model(before, tiny_feeds()), run_model(model, tiny_feeds())
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=1e-5)


def test_norm_stays_by_itself_around_a_routed_branch_when_asked_to() -> None:
    model = ir.from_onnx_text(_fused())
    SplitSkipNormsPass()(model)
    RouteLayersPass({0: np.ones(2)})(model)
    before = _ops(model)
    JoinSkipNormsPass(around_routed=False)(model)
    assert _ops(model) == before


def test_branches_stay_as_they_are_when_something_else_reads_the_stream() -> None:
    text = _BETWEEN.format(behind="logits = Mul (normed, h)")
    model = ir.from_onnx_text(text)
    _join_routed(model, LowerSkipToIfPass())
    (conditional,) = (node for node in model.graph if node.op_type == "If")
    assert len(conditional.outputs) == 1


def test_graph_is_left_alone_when_nothing_was_split() -> None:
    model = ir.from_onnx_text(_fused())
    SplitSkipNormsPass()(model)
    model.metadata_props.clear()
    assert not JoinSkipNormsPass()(model).modified


def test_graph_comes_apart_again_when_it_was_joined() -> None:
    model = ir.from_onnx_text(_fused())
    for pass_ in (SplitSkipNormsPass(), JoinSkipNormsPass(), SplitSkipNormsPass()):
        assert pass_(model).modified
    assert "SkipSimplifiedLayerNormalization" not in _ops(model)
