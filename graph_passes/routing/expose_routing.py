"""Show what the routers decide, and let a parity run decide for them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.provenance import role_values


@dataclasses.dataclass(frozen=True)
class ExposeRoutingPass(ir.passes.InPlacePass):
    """Add router scores to the graph's outputs and, on request, take the decisions from its inputs.

    For parity and active-rate builds, never released: the interface of a shipped graph does not change.

    Before::

        (…) => (logits, …)
        scores = Sigmoid(logits)
        active = Greater(scores, 0.5)
        idx    = NonZero(active)

    After, with force (without it, `active` stays)::

        (…, bool[batch, sequence] force_active.3) => (logits, …, float[batch, sequence] router_scores.3)
        router_scores.3 = Sigmoid(logits)
        idx             = NonZero(force_active.3)

    Scope: routed layers of the main graph, masked or lowered; reads of the decision in subgraphs are replaced too.

    Attributes:
        force: Replace every use of each router's decision by an input.
    """

    force: bool = False

    runs_after: ClassVar[tuple[type[ir.passes.PassBase], ...]] = (
        RouteLayersPass,
        LowerSkipToCompactionPass,
        LowerSkipToIfPass,
    )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expose the routing of every routed layer.

        Raises:
            GraphPassError: Nothing in the graph is routed.
        """
        graph = model.graph
        scores, active = role_values(graph, "router_scores"), role_values(graph, "router_active")
        if not scores:
            raise GraphPassError(
                "ExposeRoutingPass: found no router in the graph; expected nodes tagged as router scores.",
                hint="run RouteLayersPass first",
            )
        hidden = {layer: value for layer, value in scores.items() if not value.is_graph_output()}
        for layer, value in sorted(hidden.items()):
            value.name = f"router_scores.{layer}"
            graph.outputs.append(value)
        forced = dict(sorted(active.items())) if self.force else {}
        for layer, value in forced.items():
            _replace_by_input(graph, value, f"force_active.{layer}")
        return ir.passes.PassResult(model, modified=bool(hidden or forced))


def _replace_by_input(graph: ir.Graph, active: ir.Value, name: str) -> None:
    replacement = ir.Value(name=name, type=active.type, shape=active.shape)
    graph.inputs.append(replacement)
    active.replace_all_uses_with(replacement)
    decision = active.producer()
    assert decision is not None, "a tagged node produces the decision"
    constants = [value for value in decision.inputs if value is not None and value.is_initializer()]
    graph.remove(decision, safe=True)
    for constant in constants:
        if not constant.uses() and constant.name is not None:
            del graph.initializers[constant.name]
