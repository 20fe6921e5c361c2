"""Show what the routers decide, and let a parity run decide for them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.checkpoints.interface import force_active_name, router_scores_name
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import ROUTER_ACTIVE, ROUTER_SCORES, role_values


@dataclasses.dataclass(frozen=True)
class ExposeRoutingPass(GraphPass):
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

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, LoweringPass)

    def check(self, model: ir.Model) -> None:
        """Something is routed.

        Raises:
            GraphPassError: Nothing is.
        """
        if not role_values(model.graph, ROUTER_SCORES):
            raise GraphPassError(
                "ExposeRoutingPass: found no router in the graph; expected nodes tagged as router scores.",
                hint="run RouteLayersPass first",
            )

    def rewrite(self, model: ir.Model) -> bool:
        """Expose the routing of every routed layer."""
        graph = model.graph
        for layer, scores in sorted(role_values(graph, ROUTER_SCORES).items()):
            # Renaming is free here: nodes refer to values, and the released graph shows no score.
            scores.name = router_scores_name(layer)
            graph.outputs.append(scores)
        if self.force:
            for layer, active in sorted(role_values(graph, ROUTER_ACTIVE).items()):
                _replace_by_input(graph, active, force_active_name(layer))
        return True


def _replace_by_input(graph: ir.Graph, active: ir.Value, name: str) -> None:
    replacement = ir.Value(name=name, type=active.type, shape=active.shape)
    graph.inputs.append(replacement)
    active.replace_all_uses_with(replacement)
    # The comparison that decided serves nobody any more; the scores stay, as an output.
    decision = active.producer()
    assert decision is not None, "a tagged node produces the decision"
    remove_with_sources(graph, decision)
