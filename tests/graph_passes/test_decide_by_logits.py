"""Routers that compare logits: the same decisions in fewer operators, and what parity reads of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.router_thresholds import logit_threshold
from dlo_export.graph_passes.find.data_flow import constant_tensor
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.routing.decide_by_logits import DecideByLogitsPass, decisions_by_scores
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.provenance import THRESHOLD_KEY, role_values
from tests.graph_passes.golden_graphs import ROUTERS, golden_feeds, source_text
from tests.graph_passes.harness import census, check_idempotence, run_model

LOWERINGS = {"if": LowerSkipToIfPass(reduce_bool=True), "compact": LowerSkipToCompactionPass()}
THRESHOLD = float(np.float32(0.6))
# Operators that go, of the router and of what reads its decision.
GO: dict[tuple[RoutingKind, str], dict[str, int]] = {
    ("mlp", "if"): {"Sigmoid": 1, "Squeeze": 1, "Unsqueeze": 1},
    ("mlp", "compact"): {"Sigmoid": 1, "Squeeze": 0, "Unsqueeze": 0},
    ("layer", "if"): {"Sigmoid": 1, "Squeeze": 0, "Unsqueeze": 2},
    ("attention", "if"): {"Sigmoid": 1, "Squeeze": 1, "Unsqueeze": 1},
    ("attention-active", "compact"): {"Sigmoid": 1, "Squeeze": 0, "Unsqueeze": 0},
}


def lowered(
    kind: RoutingKind, lowering: str, *, gap: float = 0.0, threshold: float = THRESHOLD, rows: bool = False
) -> ir.Model:
    model = ir.from_onnx_text(source_text())
    route = RouteLayersPass(ROUTERS, rescale=gap != 0, scale_gap=gap, kind=kind, thresholds={0: threshold})
    for pass_ in (route, LOWERINGS[lowering]):
        pass_(model)
    if rows:
        MultiplyRouterRowsPass()(model)
    return model


def saved(model: ir.Model) -> ir.Model:
    """As whoever opens a file sees it."""
    return ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    return golden_feeds([value.name or "" for value in model.graph.inputs], sequence=6)


@pytest.mark.parametrize(("kind", "lowering"), GO, ids=["-".join(each) for each in GO])
@pytest.mark.parametrize("rows", [False, True], ids=["column", "row"])
def test_deciding_by_logits_changes_no_bit_and_leaves_out_operators(
    kind: RoutingKind, lowering: str, rows: bool
) -> None:
    model = lowered(kind, lowering, rows=rows)
    expected = run_model(model, feeds_of(model))
    go = GO[kind, lowering]
    # A row is turned where it was made a column of.
    go = {**go, "Transpose": -go["Unsqueeze"]} if rows else go
    before = census(model, go)
    assert DecideByLogitsPass()(model).modified
    after = census(model, go)
    assert {op: before[op] - after[op] for op in go} == go
    outputs = run_model(model, feeds_of(model))
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(outputs[name], array, err_msg=name)
    check_idempotence(model, DecideByLogitsPass())
    assert not role_values(model.graph, "router_scores")
    assert decisions_by_scores(model.graph) == decisions_by_scores(saved(model).graph) == {}
    router = find_routers(saved(model).graph)[0]
    assert router.threshold == THRESHOLD
    assert router.logits is not None
    weight = constant_tensor(router.weight)
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), ROUTERS[0].reshape((1, -1) if rows else (-1, 1)))


@pytest.mark.parametrize(("kind", "lowering"), GO, ids=["-".join(each) for each in GO])
@pytest.mark.parametrize("rows", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("force", [False, True], ids=["free", "forced"])
def test_exposed_routing_is_that_of_the_sigmoid_when_logits_decide(
    kind: RoutingKind, lowering: str, force: bool, rows: bool
) -> None:
    with_scores, by_logits = (lowered(kind, lowering, rows=rows) for _ in range(2))
    DecideByLogitsPass()(by_logits)
    by_logits = saved(by_logits)
    for model in (with_scores, by_logits):
        assert ExposeRoutingPass(force=force)(model).modified
    check_idempotence(by_logits, ExposeRoutingPass(force=force))
    expected = run_model(with_scores, feeds_of(with_scores))
    outputs = run_model(by_logits, feeds_of(by_logits))
    assert outputs.keys() == expected.keys()
    active = expected["router_scores.0"] > np.float32(THRESHOLD)
    assert active.any()
    assert not active.all()
    for name, array in expected.items():
        np.testing.assert_array_equal(outputs[name], array, err_msg=name)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_routers_keep_their_scores_when_these_scale_the_branch(lowering: str) -> None:
    model = lowered("mlp", lowering, gap=0.5)
    assert not DecideByLogitsPass()(model).modified
    assert role_values(model.graph, "router_scores")


def test_routers_keep_their_scores_when_somebody_shows_them() -> None:
    model = lowered("mlp", "if")
    model.graph.outputs.append(role_values(model.graph, "router_scores")[0])
    assert not DecideByLogitsPass()(model).modified


def test_decision_stays_of_two_axes_when_the_graph_gives_it_out() -> None:
    model = lowered("mlp", "if")
    model.graph.outputs.append(role_values(model.graph, "router_active")[0])
    assert DecideByLogitsPass()(model).modified
    assert run_model(model, feeds_of(model))["model.routers.0.active"].shape == (2, 6)


@pytest.mark.parametrize("said", ["0.59", "2", "nan", "much", None])
def test_threshold_is_unknown_when_the_constant_is_anothers(said: str | None) -> None:
    model = lowered("mlp", "if")
    DecideByLogitsPass()(model)
    node = role_values(model.graph, "router_active")[0].producer()
    assert node is not None
    assert node.metadata_props.pop(THRESHOLD_KEY) == repr(THRESHOLD)
    if said is not None:
        node.metadata_props[THRESHOLD_KEY] = said
    assert find_routers(model.graph)[0].threshold is None


def test_threshold_is_the_one_meant_when_several_have_one_logit() -> None:
    low = np.float32(1e-6)
    near = float(np.nextafter(low, np.float32(1)))
    assert logit_threshold(float(low)) == logit_threshold(near)
    model = lowered("mlp", "if", threshold=near)
    DecideByLogitsPass()(model)
    assert find_routers(model.graph)[0].threshold == near
