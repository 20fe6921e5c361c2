"""Routers whose weights are a row: the same scores, and what ONNX Runtime makes of them."""

from __future__ import annotations

from typing import get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass, multiplies_columns
from dlo_export.graph_passes.spec.provenance import role_values
from tests.graph_passes.golden_graphs import ROUTERS
from tests.graph_passes.harness import check_idempotence, run_model
from tests.graph_passes.test_decide_by_logits import LOWERINGS, feeds_of, lowered


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("kind", get_args(RoutingKind))
def test_scores_are_the_same_when_weights_are_a_row(kind: RoutingKind, lowering: str) -> None:
    column, row = (lowered(kind, lowering, gap=0.5, rows=rows) for rows in (False, True))
    assert (multiplies_columns(column.graph), multiplies_columns(row.graph)) == (True, False)
    for model in (column, row):
        model.graph.outputs.append(role_values(model.graph, "router_scores")[0])
    expected, outputs = run_model(column, feeds_of(column)), run_model(row, feeds_of(row))
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name], array, rtol=1e-6, atol=1e-6, err_msg=name)
    check_idempotence(row, MultiplyRouterRowsPass())
    weight = find_routers(row.graph)[0].weight
    assert weight is not None
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), ROUTERS[0][np.newaxis])


def test_onnxruntime_transposes_nothing_when_weights_are_a_row(tmp_path) -> None:
    model = lowered("mlp", "if", rows=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = {node.name: node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not any("stream_columns" in name for name in nodes), nodes
    assert "FusedMatMul" in nodes.values()


def test_weights_stay_a_column_when_somebody_else_reads_them() -> None:
    model = lowered("mlp", "if")
    weight = find_routers(model.graph)[0].weight
    assert weight is not None
    model.graph.outputs.append(weight)
    assert not MultiplyRouterRowsPass()(model).modified
