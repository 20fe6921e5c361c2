"""Fused norms come apart for the passes on layers, and are fused again for who runs the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.graphs import tiny_feeds
from tests.graph_passes.harness import run_model
from tests.graph_passes.test_split_skip_norms import _fused


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


def test_norm_stays_by_itself_when_a_routed_branch_begins_with_it() -> None:
    model = ir.from_onnx_text(_fused())
    SplitSkipNormsPass()(model)
    RouteLayersPass({0: np.ones(2)})(model)
    before = _ops(model)
    JoinSkipNormsPass()(model)
    assert _ops(model) == before


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
