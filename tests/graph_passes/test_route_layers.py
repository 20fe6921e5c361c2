from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY, role_values
from tests.graph_passes.graphs import in_float16, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import Arrays, check_pass, run_model

ROUTER = np.array([0.7, -0.9], np.float32)
BEFORE = {"Where": 0, "Greater": 0, "Add": 2}


def _routed_logits(rescale: bool, factor: float, gap: float, router: np.ndarray = ROUTER) -> tuple[Arrays, np.ndarray]:
    """Reference in NumPy, from the plain graph's own intermediate values."""
    text = tiny_decoder().replace(
        "float[B,S,2] logits", "float[B,S,2] logits, float[B,S,2] h, float[B,S,2] d, float[B,S,2] x"
    )
    values = run_model(ir.from_onnx_text(text), tiny_feeds())
    score = 1 / (1 + np.exp(-(values["x"] @ router)))
    scale = 0.5 * factor + (score - 0.5) * gap if rescale else np.ones_like(score)
    masked = np.where((score > 0.5)[..., None], scale[..., None] * values["d"], 0)
    return values, values["h"] + masked


@pytest.mark.parametrize(
    ("rescale", "factor", "gap", "ops"),
    [
        (False, 1.5, 0.7, {"Where": 1, "Greater": 1, "Add": 2, "Mul": 2}),
        (True, 2.0, 0.0, {"Where": 1, "Add": 2, "Mul": 2}),
        (True, 1.5, 0.0, {"Where": 1, "Add": 2, "Mul": 3}),
        (True, 1.0, 1.0, {"Where": 1, "Add": 2, "Mul": 4}),
        (True, 1.5, 0.7, {"Where": 1, "Add": 3, "Mul": 4}),
    ],
)
def test_routing_masks_and_scales_the_branch_when_rule_is(
    rescale: bool, factor: float, gap: float, ops: dict[str, int]
) -> None:
    plain, logits = _routed_logits(rescale, factor, gap)
    active = plain["x"] @ ROUTER > 0
    assert 0 < active.sum() < active.size, "the test needs tokens of both kinds"
    pass_ = RouteLayersPass({0: ROUTER}, rescale, factor, gap)
    model = check_pass(
        tiny_decoder(), pass_, BEFORE, ops, tiny_feeds(), expected=lambda before: {**before, "logits": logits}
    )
    made = [node for node in model.graph if node.metadata_props.get(PASS_KEY) == "RouteLayersPass"]
    assert "Where" in {node.op_type for node in made}
    assert set(role_values(model.graph, "router_scores")) == set(role_values(model.graph, "router_active")) == {0}


def test_routing_skips_every_token_when_router_is_zero() -> None:
    _, logits = _routed_logits(False, 2.0, 0.0, np.zeros(2, np.float32))
    pass_ = RouteLayersPass({0: np.zeros((1, 2))})
    check_pass(tiny_decoder(), pass_, BEFORE, {"Where": 1}, tiny_feeds(), expected=lambda _: {"logits": logits})


def test_routing_computes_in_float32_when_graph_is_float16() -> None:
    model = in_float16(ir.from_onnx_text(tiny_decoder()))
    feeds = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in tiny_feeds().items()
    }
    # In float16 the sigmoid of these logits would round to 0.5 and every token would be skipped.
    router = np.array([2.0**-12, 0.0], np.float32)
    RouteLayersPass({0: router}, rescale=True, scale_factor=1.5, scale_gap=0.5)(model)
    active = role_values(model.graph, "router_active")[0]
    model.graph.outputs.append(active)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert [node.outputs[0].dtype for node in casts] == [ir.DataType.FLOAT, ir.DataType.FLOAT16]
    assert role_values(model.graph, "router_scores")[0].dtype == ir.DataType.FLOAT
    masked = run_model(model, feeds)
    first_column = np.array([1, -3, 1, 0.5])
    np.testing.assert_array_equal(masked[active.name], first_column[feeds["ids"]] > 0)


@pytest.mark.parametrize("gap", [0.0, 2.0])
def test_routing_refuses_when_the_scale_is_more_than_the_branch_s_type_holds(gap: float) -> None:
    within, beyond = 2 * 65504.0 - gap, 2 * 65504.0 - gap + 64
    RouteLayersPass({0: ROUTER}, True, within, gap)(in_float16(ir.from_onnx_text(tiny_decoder())))
    with pytest.raises(GraphPassError, match="layer 0: the rule scales its MLP by up to 65536, float16 ends at 65504"):
        RouteLayersPass({0: ROUTER}, True, beyond, gap)(in_float16(ir.from_onnx_text(tiny_decoder())))
    RouteLayersPass({0: ROUTER}, True, beyond, gap)(ir.from_onnx_text(tiny_decoder()))


def test_routing_refuses_when_the_least_active_token_is_scaled_by_more_than_the_branch_s_type_holds() -> None:
    """With a gap below zero, the scale is largest where the score is smallest, at the layer's own threshold."""
    factor, lowest = 2 * 65504.0 - 160.0, {0: 0.25}  # by up to factor / 2 + gap · (threshold − 1/2)
    RouteLayersPass({0: ROUTER}, True, factor, -320.0, thresholds=lowest)(in_float16(ir.from_onnx_text(tiny_decoder())))
    with pytest.raises(GraphPassError, match="layer 0: the rule scales its MLP by up to 65520, float16 ends at 65504"):
        RouteLayersPass({0: ROUTER}, True, factor, -384.0, thresholds=lowest)(
            in_float16(ir.from_onnx_text(tiny_decoder()))
        )


def test_routing_reports_all_problems_when_routers_do_not_fit() -> None:
    with pytest.raises(GraphPassError) as error:
        RouteLayersPass({0: np.array([0, np.nan, 0]), 5: np.zeros(2)})(ir.from_onnx_text(tiny_decoder(opset=12)))
    message = str(error.value)
    assert "router 0 has 3 weights, expected 2" in message
    assert "router 0 holds NaN or infinity" in message
    assert "layer 5 does not exist, expected 0 to 0" in message
    assert "opset 12, expected 13 or newer" in message
    assert "hint: " in message


def test_routing_takes_the_oldest_opset_that_its_operators_need() -> None:
    assert RouteLayersPass({0: ROUTER})(ir.from_onnx_text(tiny_decoder(opset=13))).modified


def test_routing_refuses_when_no_router_is_given() -> None:
    with pytest.raises(GraphPassError, match="no routers were given"):
        RouteLayersPass({})(ir.from_onnx_text(tiny_decoder()))


SCALED = RouteLayersPass({0: ROUTER}, True, 2.0, 0.1)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (RouteLayersPass({0: ROUTER}), RouteLayersPass({0: ROUTER * 2})),
        (RouteLayersPass({0: ROUTER}), SCALED),
        (RouteLayersPass({0: ROUTER}), RouteLayersPass({0: ROUTER}, thresholds={0: 0.25})),
        (SCALED, dataclasses.replace(SCALED, scale_gap=0.2)),
        (SCALED, dataclasses.replace(SCALED, scale_factor=1.5)),
    ],
)
def test_routing_refuses_when_layer_is_routed_differently_already(
    first: RouteLayersPass, other: RouteLayersPass
) -> None:
    model = ir.from_onnx_text(tiny_decoder())
    first(model)
    with pytest.raises(GraphPassError, match="RouteLayersPass: ran on this graph before, with"):
        other(model)
