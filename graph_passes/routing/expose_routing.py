"""Show what the routers decide, and let a parity run decide for them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import force_active_name, router_scores_name
from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.routers import Router, find_routers, single_axis
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.routing.decide_by_logits import DecideByLogitsPass
from dlo_export.graph_passes.routing.multiply_router_rows import single_axes
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import ROUTER_SCORES, Dims, TaggedNodes, shared_constant


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

    Where logits decide (`DecideByLogitsPass`), the scores are computed besides, and the input gets the logits' axes::

        router_scores.3 = Sigmoid(Squeeze(logits, -1))
        masked          = Where(Unsqueeze(force_active.3, -1), d, 0)

    Scope: routed layers of the main graph, masked or lowered; reads of the decision in subgraphs are replaced too.

    Attributes:
        force: Replace every use of each router's decision by an input.
    """

    force: bool = False

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, LoweringPass, DecideByLogitsPass)

    def check(self, model: ir.Model) -> None:
        """Something is routed.

        Raises:
            GraphPassError: Nothing is.
        """
        if not find_routers(model.graph):
            raise GraphPassError(
                "ExposeRoutingPass: found no router in the graph; expected nodes tagged as a router's.",
                hint="run RouteLayersPass first",
            )

    def rewrite(self, model: ir.Model) -> bool:
        """Expose the routing of every routed layer."""
        graph = model.graph
        for layer, router in find_routers(graph).items():
            scores = router.scores or _add_scores(graph, router, layer, self._name)
            # Renaming is free here: nodes refer to values, and the released graph shows no score.
            scores.name = router_scores_name(layer)
            graph.outputs.append(scores)
            if not self.force:
                continue
            if router.gathering is not None:
                _gather_by_input(graph, router.gathering, layer, self._name)
            elif router.active is not None:
                _replace_by_input(graph, router, router.active, layer, self._name)
        return True


def _add_scores(graph: ir.Graph, router: Router, layer: int, made_by: str) -> ir.Value:
    """Computes the scores of a router that decides by its logits."""
    logits, new, float32 = router.logits, TaggedNodes(made_by, layer), ir.DataType.FLOAT
    assert logits is not None, "it has those if it has no scores"
    product = logits.producer()
    assert product is not None, "a tagged node computes them"
    name, shape = f"{router_path(layer)}.scores", _token_dims(logits, logits)
    by_token = new.add("Squeeze", logits, single_axes(graph, logits), name=f"{name}.logits", dtype=float32, shape=shape)
    scores = new.add("Sigmoid", by_token, name=name, dtype=float32, shape=shape, role=ROUTER_SCORES)
    graph.insert_after(product, new.nodes)
    return scores


def _replace_by_input(graph: ir.Graph, router: Router, active: ir.Value, layer: int, made_by: str) -> None:
    """Has everybody who read the decision read the input, with the axes that the decision had."""
    decision, name = active.producer(), force_active_name(layer)
    assert decision is not None, "a tagged node produces the decision"
    tokens = active.shape if router.logits is None else _token_dims(active, router.logits)
    forced = ir.Value(name=name, type=active.type, shape=None if tokens is None else ir.Shape(tokens))
    graph.inputs.append(forced)
    if router.logits is not None:
        new, boolean = TaggedNodes(made_by, layer), ir.DataType.BOOL
        axis = single_axes(graph, router.logits)
        forced = new.add("Unsqueeze", forced, axis, name=f"{name}.column", dtype=boolean, shape=active.shape)
        graph.insert_before(decision, new.nodes)
    active.replace_all_uses_with(forced)
    # The comparison that decided serves nobody any more; the scores stay, as an output.
    remove_with_sources(graph, decision)


def _gather_by_input(graph: ir.Graph, node: ir.Node, layer: int, made_by: str) -> None:
    """Has rows gathered by the operator itself, of the tokens that the input says."""
    tokens, name, nodes = node.outputs[0].shape or (None, None), force_active_name(layer), TaggedNodes(made_by, layer)
    forced = ir.Value(name=name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(tokens))
    graph.inputs.append(forced)
    # The scores of a router of width 1, whose weight is 1, are the sigmoids of 0 and 1: 0.5 and 0.73.
    float32 = ir.DataType.FLOAT
    one = shared_constant(graph, f"{ROUTERS}.forcing_weight", np.ones((1, 1), np.float32))
    between = shared_constant(graph, f"{ROUTERS}.forcing_threshold", np.array(0.6, np.float32))
    stream = nodes.add("Cast", forced, name=f"{name}.float", dtype=float32, shape=tokens, to=int(float32))
    column = nodes.add("Unsqueeze", stream, _last_axis(graph), name=f"{name}.column", dtype=float32, shape=(*tokens, 1))
    inputs = [column, one, between, node.inputs[3]]
    again = ir.node(node.op_type, inputs, domain=node.domain, num_outputs=len(node.outputs), name=f"{name}.gather")
    for number, (old, new) in enumerate(zip(node.outputs, again.outputs, strict=True)):
        new.name, new.type, new.shape = f"{name}.gather.{number}", old.type, old.shape
        if number:
            old.replace_all_uses_with(new)
            old.shape = None  # the router's own number of rows is another one, and may not have its name
    graph.insert_after(node, [*nodes.nodes, again])


def _token_dims(value: ir.Value, product: ir.Value) -> Dims | None:
    """The dimensions of a value that has a product's axes, without the one that is no token's."""
    if value.shape is None:
        return None
    return tuple(size for axis, size in enumerate(value.shape) if axis != single_axis(product))


def _last_axis(graph: ir.Graph) -> ir.Value:
    return shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
