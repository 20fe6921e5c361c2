"""dlo::GatherActive in place of a router and what finds its active rows, run by its body in standard operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.find.data_flow import constant_tensor
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_plugin import LowerSkipToPluginPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.fuse_router_gather import FuseRouterGatherPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE, VERSION, reference_function
from dlo_export.graph_passes.spec.provenance import role_values
from tests.graph_passes import golden_graphs
from tests.graph_passes.graphs import in_float16, tiny_decoder, tiny_feeds
from tests.graph_passes.harness import census, check_idempotence, run_model

ROUTER = np.array([0.7, -0.9], np.float32)
FUSED = {"GatherActive": 1, "Greater": 0, "NonZero": 0, "Transpose": 0, "Squeeze": 0}


def compacted(rescale: bool = False) -> ir.Model:
    model = ir.from_onnx_text(tiny_decoder())
    RouteLayersPass({0: ROUTER}, rescale=rescale)(model)
    LowerSkipToCompactionPass()(model)
    return model


def run(model: ir.Model, **more: np.ndarray) -> dict[str, np.ndarray]:
    """With the operator's body, by which it may have any schema."""
    if not onnx.defs.has(GATHER_ACTIVE.name, domain=DOMAIN):
        parameter = onnx.defs.OpSchema.FormalParameter
        types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
        operands = [
            [parameter(each.name, types[each.dtype]) for each in side]
            for side in (GATHER_ACTIVE.inputs, GATHER_ACTIVE.outputs)
        ]
        schema = onnx.defs.OpSchema(GATHER_ACTIVE.name, DOMAIN, VERSION, inputs=operands[0], outputs=operands[1])
        onnx.defs.register_schema(schema)
    function = reference_function(GATHER_ACTIVE)
    model.functions[function.identifier()] = function
    return run_model(model, {**tiny_feeds(), **more})


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "scaled by the score"])
def test_operator_takes_the_place_of_router_and_gather_when_rows_are_gathered(rescale: bool) -> None:
    before = run_model(compacted(rescale), tiny_feeds())
    model = compacted(rescale)
    assert FuseRouterGatherPass()(model).modified
    assert census(model, FUSED) == FUSED
    router = find_routers(model.graph)[0]
    assert router.threshold == 0.5
    np.testing.assert_array_equal(constant_tensor(router.weight).numpy(), ROUTER[:, np.newaxis])
    check_idempotence(model, FuseRouterGatherPass())
    np.testing.assert_array_equal(run(model)["logits"], before["logits"])


@pytest.mark.parametrize("active", [True, False])
def test_forced_decisions_reach_the_gathered_rows_when_routing_is_exposed(active: bool) -> None:
    forced = {"force_active.0": np.full((2, 3), active)}
    models = [compacted(), compacted()]
    FuseRouterGatherPass()(models[1])
    for model in models:
        ExposeRoutingPass(force=True)(model)
    expected, found = run_model(models[0], {**tiny_feeds(), **forced}), run(models[1], **forced)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_router_is_left_alone_when_others_read_its_decision() -> None:
    model = compacted()
    model.graph.outputs.append(role_values(model.graph, "router_active")[0])
    assert not FuseRouterGatherPass()(model).modified


def test_router_is_left_alone_when_rows_are_of_another_type_than_the_operator_gathers() -> None:
    model = in_float16(ir.from_onnx_text(tiny_decoder()))
    for pass_ in (RouteLayersPass({0: ROUTER}), LowerSkipToCompactionPass()):
        pass_(model)
    assert not FuseRouterGatherPass()(model).modified


def test_router_is_left_alone_when_nothing_is_gathered() -> None:
    model = ir.from_onnx_text(tiny_decoder())
    RouteLayersPass({0: ROUTER})(model)
    assert not FuseRouterGatherPass()(model).modified


def test_dense_mlp_is_not_run_on_rows_when_quantised_ones_are() -> None:
    graphs = []
    for on_rows in (False, True):
        model = ir.from_onnx_text(golden_graphs.source_text())
        RouteLayersPass(golden_graphs.ROUTERS)(model)
        LowerSkipToPluginPass(quantised_on_rows=on_rows)(model)
        graphs.append(golden_graphs.golden_text(model))
    assert "SkipGateUp" in graphs[0]
    assert graphs[0] == graphs[1]
