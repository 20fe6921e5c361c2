from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_topk import LowerSkipToTopKPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass, check_order, passes_run
from tests.graph_passes import golden_graphs
from tests.graph_passes.harness import as_text

ROUTE = RouteLayersPass(golden_graphs.ROUTERS)


def _plain() -> ir.Model:
    return ir.from_onnx_text(golden_graphs.source_text())


def _round_trip(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))


def test_model_remembers_what_ran_when_it_was_saved() -> None:
    model = _plain()
    for pass_ in (ROUTE, UseStaticCachePass(8), LowerSkipToTopKPass(16)):
        pass_(model)
    runs = passes_run(_round_trip(model))
    assert [run.name for run in runs] == ["RouteLayersPass", "UseStaticCachePass", "LowerSkipToTopKPass"]
    assert runs[1].settings == {"max_cache": 8}
    earlier = {
        "InjectLayersPass",
        "RemoveIdentityLayersPass",
        "UseFullMaskPass",
        "RouteLayersPass",
        "UseStaticCachePass",
    }
    assert set(runs[2].runs_after) == earlier


@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        (UseStaticCachePass(8), UseStaticCachePass(8), UseStaticCachePass(16)),
        (FuseSiblingMatMulsPass(3), FuseSiblingMatMulsPass(), FuseSiblingMatMulsPass(2)),
        (ROUTE, RouteLayersPass(golden_graphs.ROUTERS), RouteLayersPass(golden_graphs.ROUTERS, rescale=True)),
    ],
    ids=lambda pass_: type(pass_).__name__,
)
def test_second_run_changes_nothing_or_is_refused_when_settings_are(
    first: GraphPass, same: GraphPass, other: GraphPass
) -> None:
    model = _plain()
    assert first(model).modified
    model = _round_trip(model)
    before = as_text(model)
    assert not same(model).modified
    with pytest.raises(GraphPassError, match=f"{type(first).__name__}: ran on this graph before, with "):
        other(model)
    assert as_text(model) == before


def test_late_pass_is_refused_when_one_that_runs_after_it_has_run() -> None:
    model = _plain()
    for pass_ in (ROUTE, LowerSkipToCompactionPass(), ExposeRoutingPass()):
        pass_(model)
    model = _round_trip(model)
    before = as_text(model)
    with pytest.raises(GraphPassError, match="LowerSkipToTopKPass: ExposeRoutingPass ran before, expected after it"):
        LowerSkipToTopKPass(16)(model)
    assert as_text(model) == before


def test_pass_is_not_remembered_when_it_changed_nothing() -> None:
    model = _plain()
    assert not FuseSiblingMatMulsPass(4)(model).modified
    assert passes_run(model) == ()


def test_list_is_accepted_when_passes_follow_what_they_run_after() -> None:
    check_order([ROUTE, LowerSkipToCompactionPass(), ExposeRoutingPass()])
    check_order([ROUTE])


def test_list_is_refused_with_all_violations_when_it_is_reversed() -> None:
    with pytest.raises(GraphPassError) as error:
        check_order([ExposeRoutingPass(), LowerSkipToCompactionPass(), ROUTE])
    assert "ExposeRoutingPass stands at 0, before LowerSkipToCompactionPass at 1" in str(error.value)
    assert "ExposeRoutingPass stands at 0, before RouteLayersPass at 2" in str(error.value)
    assert "LowerSkipToCompactionPass stands at 1, before RouteLayersPass at 2" in str(error.value)
