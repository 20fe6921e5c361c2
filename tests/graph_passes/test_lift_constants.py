from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cleanup.lift_constants import LiftConstantsPass
from tests.graph_passes.harness import check_pass, run_model

# Eight bytes in `k` and in each branch, the one of which gives its constant out.
TEXT = """<ir_version: 11, opset_import: ["" : 23]>
tiny (float[2] x, bool c) => (float[2] y, float[2] k)
{ k = Constant <value = float[2] {1,2}> ()
  b = If (c) <then_branch = t () => (float[2] o) <float[2] w = {3,4}> {o = Add (x, w)},
              else_branch = e () => (float[2] v) {v = Constant <value = float[2] {5,6}> ()}>
  y = Add (k, b) }"""
FEEDS = {"x": np.array([10, 20], np.float32)}


@pytest.mark.parametrize("condition", [True, False])
def test_constants_become_initializers_of_the_main_graph_when_large(condition: bool) -> None:
    feeds = {**FEEDS, "c": np.array(condition)}
    model = check_pass(TEXT, LiftConstantsPass(8), {"Constant": 2}, {"Constant": 0, "Identity": 2}, feeds)
    held = sorted(value.const_value.numpy().tolist() for value in model.graph.initializers.values())
    assert held == [[1, 2], [3, 4], [5, 6]]
    assert not any(graph.initializers for graph in model.graph.subgraphs())
    assert [output.name for output in model.graph.outputs] == ["y", "k"]


def test_constants_stay_when_smaller_than_the_minimum() -> None:
    text = TEXT.replace("<float[2] w = {3,4}> {o = Add (x, w)}", "{o = Neg (x)}")
    model = ir.from_onnx_text(text)
    assert not LiftConstantsPass(9)(model).modified
    assert LiftConstantsPass(8)(model).modified


def test_default_is_an_input_no_more_when_callers_could_replace_it() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
    tiny (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1,2}> { y = Add (x, w) }"""
    model = ir.from_onnx_text(text)
    assert LiftConstantsPass()(model).modified
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run_model(model, FEEDS)["y"], [11, 22])
    assert not LiftConstantsPass()(model).modified
