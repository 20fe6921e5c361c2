"""A rank that is right means: the computation on gathered rows gives the rows of the whole computation."""

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.find.token_wise import row_rank
from tests.graph_passes.harness import run_model

BATCH, SEQUENCE, HIDDEN = 2, 3, 4
CONSTANTS = "float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}, float[4] v = {1,2,3,4}, float[1,1,4] wide = {4,3,2,1}"


def _model(body, dims):
    text = f'<ir_version: 11, opset_import: ["" : 24]>\ng (float[{dims}] x) => (float[{dims}] y)\n'
    return ir.from_onnx_text(f"{text}<{CONSTANTS}, int64[1] last = {{-1}}, int64[1] first = {{0}}> {{ {body} }}")


@pytest.mark.parametrize(
    ("body", "rank"),
    [
        ("y = MatMul (x, w)", 2),
        ("a = Mul (x, v)  b = Sigmoid (a)  y = Add (a, b)", 2),
        ("y = Mul (x, wide)", 3),
        ("y = RMSNormalization <axis = -1> (x, v)", 2),
        ("y = RMSNormalization <axis = 2> (x, v)", 3),
        ("m = ReduceMean <keepdims = 1> (x, last)  y = Sub (x, m)", 2),
        ("a, b = Split <axis = -1, num_outputs = 2> (x)  c = MatMul (x, w)  y = Identity (c)", 2),
    ],
)
def test_rows_are_those_of_the_whole_when_the_rank_says_so(body, rank):
    whole = _model(body, f"{BATCH},{SEQUENCE},{HIDDEN}")
    assert row_rank(whole.graph) == (rank, [])
    x = np.random.default_rng(0).standard_normal((BATCH, SEQUENCE, HIDDEN)).astype(np.float32)
    expected = run_model(whole, {"x": x})["y"].reshape(-1, HIDDEN)[[1, 4, 5]]
    rows = x.reshape(-1, HIDDEN)[[1, 4, 5]]
    dims = f"3,{HIDDEN}" if rank == 2 else f"1,3,{HIDDEN}"
    found = run_model(_model(body, dims), {"x": rows if rank == 2 else rows[np.newaxis]})["y"]
    np.testing.assert_allclose(found.reshape(-1, HIDDEN), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "m = ReduceMean <keepdims = 1> (x, first)  y = Sub (x, m)",
        "y = Softmax <axis = 1> (x)",
        "y = CumSum (x, first)",
        "a, b = Split <axis = 0, num_outputs = 2> (x)  y = Concat <axis = 0> (b, a)",
    ],
)
def test_computation_is_refused_with_its_place_when_tokens_mix(body):
    _, problems = row_rank(_model(body, f"{BATCH},{SEQUENCE},{HIDDEN}").graph)
    assert problems
    assert all(problem.endswith("does not compute each token by itself") for problem in problems)
