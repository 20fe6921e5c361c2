from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.provenance import role_values
from tests.graph_passes.graphs import tiny_decoder, tiny_feeds
from tests.graph_passes.harness import check_idempotence, run_model

ROUTER = np.array([0.7, -0.9], np.float32)


def _routed(lowered: bool) -> ir.Model:
    model = ir.from_onnx_text(tiny_decoder())
    RouteLayersPass({0: ROUTER})(model)
    if lowered:
        LowerSkipToCompactionPass()(model)
    return model


@pytest.mark.parametrize("lowered", [False, True], ids=["masked", "compact"])
def test_exposing_adds_scores_and_keeps_the_rest_when_routed(lowered: bool) -> None:
    model = _routed(lowered)
    before = run_model(model, tiny_feeds())
    assert ExposeRoutingPass()(model).modified
    after = run_model(model, tiny_feeds())
    scores = after.pop("router_scores.0")
    assert scores.shape == (2, 3)
    assert scores.dtype == np.float32
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    check_idempotence(model, ExposeRoutingPass())


@pytest.mark.parametrize("lowered", [False, True], ids=["masked", "compact"])
def test_forcing_overrides_every_decision_when_input_is_given(lowered: bool) -> None:
    plain = run_model(ir.from_onnx_text(tiny_decoder()), tiny_feeds())
    free = _routed(lowered)
    free.graph.outputs.append(role_values(free.graph, "router_active")[0])
    decisions = run_model(free, tiny_feeds())
    model = _routed(lowered)
    assert ExposeRoutingPass(force=True)(model).modified
    assert not role_values(model.graph, "router_active"), "no decision of the graph's own is left"
    active = decisions.pop("model.routers.0.active")
    same = run_model(model, {**tiny_feeds(), "force_active.0": active})
    np.testing.assert_array_equal(same["logits"], decisions["logits"])
    dense = run_model(model, {**tiny_feeds(), "force_active.0": np.ones_like(active)})
    np.testing.assert_allclose(dense["logits"], plain["logits"], rtol=0, atol=1e-6)
    skipped = run_model(model, {**tiny_feeds(), "force_active.0": np.zeros_like(active)})
    assert np.abs(skipped["logits"] - plain["logits"]).max() > 0.1
    check_idempotence(model, ExposeRoutingPass(force=True))


def test_exposing_survives_a_round_trip_when_model_is_saved() -> None:
    model = _routed(lowered=True)
    model = ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))
    ExposeRoutingPass(force=True)(model)
    assert [value.name for value in model.graph.inputs][-1] == "force_active.0"


def test_exposing_refuses_when_nothing_is_routed() -> None:
    with pytest.raises(GraphPassError, match="found no router"):
        ExposeRoutingPass()(ir.from_onnx_text(tiny_decoder()))
