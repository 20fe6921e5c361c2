"""Rows of one product are put in their places at once, where nothing else becomes of them."""

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.golden_graphs import ROUTERS, source_text
from tests.graph_passes.harness import census, check_idempotence, run_model

FEEDS = {
    "input_ids": np.array([[1, 4, 0, 2]]),
    "attention_mask": np.ones((1, 6), np.int64),
    "position_ids": np.array([[2, 3, 4, 5]]),
    "past_active.0": np.array([[True, False]]),
    "past_key_values.0.key": np.array([0.3, -0.2, 0, 0], np.float32).reshape(1, 1, 2, 2),
    "past_key_values.0.value": np.array([0.5, 0.1, 0, 0], np.float32).reshape(1, 1, 2, 2),
}


def _compacted(*, branches: bool) -> ir.Model:
    model = ir.from_onnx_text(source_text())
    routed = RouteLayersPass(ROUTERS, kind="layer")
    for pass_ in (routed, LowerSkipToCompactionPass(branches=branches), FuseSiblingMatMulsPass()):
        pass_(model)
    return model


@pytest.mark.parametrize("branches", [True, False], ids=["in a branch", "in the main graph"])
def test_rows_are_scattered_once_when_query_key_and_value_are_one_product(branches: bool) -> None:
    model = _compacted(branches=branches)
    before, scatters = run_model(model, FEEDS), census(model, {"ScatterND": 0})["ScatterND"]
    assert before["present_active.0"].sum() not in {1, 5}, "some of the step's tokens skip"
    assert ScatterPackedRowsPass()(model).modified
    assert census(model, {"ScatterND": 0})["ScatterND"] == scatters - 2
    for name, values in run_model(model, FEEDS).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    check_idempotence(model, ScatterPackedRowsPass())


def _shown(model: ir.Model, split: ir.Node) -> None:
    model.graph.outputs.append(split.outputs[1])


def _read_twice(model: ir.Model, split: ir.Node) -> None:
    split.graph.append(ir.node("Neg", [split.outputs[0]]))  # type: ignore[union-attr]


def _put_elsewhere(model: ir.Model, split: ir.Node) -> None:
    scatter = split.outputs[2].consumers()[0]
    other = ir.node("Identity", [scatter.inputs[1]])
    split.graph.insert_before(scatter, other)  # type: ignore[union-attr]
    scatter.replace_input_with(1, other.outputs[0])


def _added(model: ir.Model, split: ir.Node) -> None:
    split.outputs[2].consumers()[0].attributes.add(ir.AttrString("reduction", "add"))


def _onto_ones(model: ir.Model, split: ir.Node) -> None:
    zeros = split.outputs[2].consumers()[0].inputs[0].producer()  # type: ignore[union-attr]
    zeros.attributes.add(ir.AttrTensor("value", ir.tensor(np.ones(1, np.float32))))  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [_shown, _read_twice, _put_elsewhere, _added, _onto_ones])
def test_rows_are_left_alone_when_they_are_more_than_scattered(change) -> None:
    model = _compacted(branches=False)
    change(model, next(node for node in model.graph if node.op_type == "Split"))
    assert not ScatterPackedRowsPass()(model).modified
