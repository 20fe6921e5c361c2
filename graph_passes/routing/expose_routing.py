"""Show what the routers decide, and let a parity run decide for them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import force_active_name, router_scores_name
from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.routing.fuse_router_gather import gathers_active
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import (
    ROUTER_ACTIVE,
    ROUTER_SCORES,
    TaggedNodes,
    role_values,
    shared_constant,
)


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

    An operator that decides by itself (`FuseRouterGatherPass`) stays for its scores, and a second one gathers, whose
    router has the width 1, and makes of the input what it says::

        scores, _, _ = dlo::GatherActive(x, w, 0.5, n)
        _, idx, rows = dlo::GatherActive(Unsqueeze(Cast(force_active.3), -1), 1, 0.6, n)

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
            for layer, scores in sorted(role_values(graph, ROUTER_SCORES).items()):
                if gathers_active(node := scores.producer()):
                    _gather_by_input(graph, node, layer, self._name)
        return True


def _replace_by_input(graph: ir.Graph, active: ir.Value, name: str) -> None:
    replacement = ir.Value(name=name, type=active.type, shape=active.shape)
    graph.inputs.append(replacement)
    active.replace_all_uses_with(replacement)
    # The comparison that decided serves nobody any more; the scores stay, as an output.
    decision = active.producer()
    assert decision is not None, "a tagged node produces the decision"
    remove_with_sources(graph, decision)


def _gather_by_input(graph: ir.Graph, node: ir.Node, layer: int, made_by: str) -> None:
    """Has rows gathered by the operator itself, of the tokens that the input says."""
    tokens, name, nodes = node.outputs[0].shape or (None, None), force_active_name(layer), TaggedNodes(made_by, layer)
    forced = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(tokens))
    graph.inputs.append(forced)
    # The scores of a router of width 1, whose weight is 1, are the sigmoids of 0 and 1: 0.5 and 0.73.
    float32 = ir.DataType.FLOAT
    last = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    one = shared_constant(graph, f"{ROUTERS}.forcing_weight", np.ones((1, 1), np.float32))
    between = shared_constant(graph, f"{ROUTERS}.forcing_threshold", np.array(0.6, np.float32))
    stream = nodes.add("Cast", forced, name=f"{name}.float", dtype=float32, shape=tokens, to=int(float32))
    column = nodes.add("Unsqueeze", stream, last, name=f"{name}.column", dtype=float32, shape=(*tokens, 1))
    inputs = [column, one, between, node.inputs[3]]
    again = ir.node(node.op_type, inputs, domain=node.domain, num_outputs=len(node.outputs), name=f"{name}.gather")
    for number, (old, new) in enumerate(zip(node.outputs, again.outputs, strict=True)):
        new.name, new.type, new.shape = f"{name}.gather.{number}", old.type, old.shape
        if number:
            old.replace_all_uses_with(new)
            old.shape = None  # the router's own number of rows is another one, and may not have its name
    graph.insert_after(node, [*nodes.nodes, again])
