"""Have routers decide by their logits, in as few operators as standard ONNX takes for it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.checkpoints.router_thresholds import ONE_HALF, logit_threshold
from dlo_export.graph_passes.find.data_flow import constant_integers, is_op, producer_of
from dlo_export.graph_passes.find.routers import find_routers, router_product, single_axis
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass, single_axes
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import (
    ROLE_KEY,
    ROUTER_ACTIVE,
    ROUTER_LOGITS,
    THRESHOLD_KEY,
    TaggedNodes,
    shared_constant,
)


@dataclasses.dataclass(frozen=True)
class DecideByLogitsPass(GraphPass):
    """Leave out what routers compute only to decide: the sigmoid, and an axis taken away and added again.

    In a decode step of a small model, what routing costs is the number of its operators. A sigmoid rises, so a score is
    above a threshold where its logit is above another one: z is the largest float32 whose sigmoid, rounded to float32,
    is not above t (`logit_threshold`).

    Before::

        active = Greater(Sigmoid(Squeeze(MatMul(x, w), -1)), t)        # bool [batch, sequence]
        any    = ReduceMax<keepdims=0>(active)
        masked = Where(Unsqueeze(active, -1), d, 0)
        idx    = Transpose(NonZero(active))

    After::

        column = Greater(MatMul(x, w), z)                              # bool [batch, sequence, 1]
        any    = ReduceMax<keepdims=0>(column)
        masked = Where(column, d, 0)
        idx    = Transpose(NonZero(Squeeze(column, -1)))

    What reads tokens, as a gathering or the state of layer routing does, has one Squeeze as before; what reads columns
    alone, as `LowerSkipToIfPass` leaves it, none. Where the product is a row (`MultiplyRouterRowsPass`), so is the
    decision, and what reads a column has a Transpose in the Unsqueeze's place::

        row    = Greater(MatMul(w, Transpose(x)), z)                   # bool [batch, 1, sequence]
        masked = Where(Transpose<perm=[0, 2, 1]>(row), d, 0)
        idx    = Transpose(NonZero(Squeeze(row, 1)))

    Optional: scores that somebody else reads, to scale a branch by or to show them, are left alone with their decision.
    Scope: routers of the main graph in the form RouteLayersPass writes; the decision's columns in branches, too.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, MultiplyRouterRowsPass)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every router whose scores serve its decision alone."""
        found = decisions_by_scores(model.graph)
        for layer, decision in found.items():
            self._rewrite(model.graph, layer, decision)
        return bool(found)

    def _rewrite(self, graph: ir.Graph, layer: int, by_scores: DecisionByScores) -> None:
        comparison, product, threshold = by_scores.comparison, by_scores.product, by_scores.threshold
        active = comparison.outputs[0]
        node = product.producer()
        assert node is not None, "a MatMul gives it"

        # The product itself is compared, with the logit that stands for the threshold; the comparison says for which.
        router, new, boolean = router_path(layer), TaggedNodes(self._name, layer), ir.DataType.BOOL
        name = f"{ROUTERS if threshold == ONE_HALF else router}.logit_threshold"
        limit = shared_constant(graph, name, np.array(logit_threshold(threshold), np.float32))
        name, shape = f"{router}.decision", product.shape
        decision = new.add("Greater", product, limit, name=name, dtype=boolean, shape=shape, role=ROUTER_ACTIVE)
        new.nodes[0].metadata_props[THRESHOLD_KEY] = repr(threshold)
        node.metadata_props[ROLE_KEY] = ROUTER_LOGITS
        axis, name = single_axes(graph, product), f"{router}.tokens"
        tokens = new.add("Squeeze", decision, axis, name=name, dtype=boolean, shape=active.shape)
        graph.insert_before(comparison, new.nodes)

        # Who made a column of the decision, in branches too, or asks whether any token is active, reads this one.
        for use in tuple(active.uses()):
            if _makes_column(use.node):
                _replace_column(graph, use.node, decision, single_axis(product))
            elif _reduces_all(use.node):
                use.node.replace_input_with(use.idx, decision)
        # The others have their two axes; then what nobody reads goes, with the sigmoid.
        replace_value(active, tokens)
        remove_with_sources(graph, comparison)
        if not tokens.uses() and not tokens.is_graph_output():
            remove_with_sources(graph, new.nodes[1])


@dataclasses.dataclass(frozen=True, eq=False)
class DecisionByScores:
    """A comparison of scores that nothing else reads.

    Attributes:
        comparison: The Greater.
        product: float32, whose sigmoids the scores are, with its `single_axis`.
        threshold: What the scores are compared with, above 0 and below 1.
    """

    comparison: ir.Node
    product: ir.Value
    threshold: float


def decisions_by_scores(graph: ir.Graph) -> dict[int, DecisionByScores]:
    """The comparisons, by layer, for which alone a graph computes scores; empty behind `DecideByLogitsPass`."""
    found = {}
    for layer, router in find_routers(graph).items():
        scores, threshold = router.scores, router.threshold
        comparison = producer_of(router.active)
        if scores is None or comparison is None or threshold is None or not 0 < threshold < 1:
            continue
        alone, product = len(tuple(scores.uses())) == 1 and not scores.is_graph_output(), router_product(scores)
        if alone and product is not None and is_op(comparison, "Greater") and comparison.inputs[0] is scores:
            found[layer] = DecisionByScores(comparison, product, threshold)
    return found


def _replace_column(main: ir.Graph, node: ir.Node, decision: ir.Value, single: Literal[1, 2]) -> None:
    """Puts a decision, as it is or transposed, in place of a column made of tokens, in the main graph or a branch."""
    (old,), (_, axes), graph = node.outputs, node.inputs, node.graph
    assert isinstance(graph, ir.Graph), "nodes of functions are not looked at"
    if single == 1:
        turned = ir.node("Transpose", [decision], {"perm": (0, 2, 1)}, metadata_props=dict(node.metadata_props))
        turned.name, turned.outputs[0].type, turned.outputs[0].shape = node.name, old.type, old.shape
        graph.insert_before(node, turned)
        replace_value(old, turned.outputs[0])
    else:
        old.replace_all_uses_with(decision)
    graph.remove(node, safe=True)
    if axes is not None and axes.name is not None and not axes.uses():
        main.initializers.pop(axes.name, None)


def _makes_column(node: ir.Node) -> bool:
    axes = constant_integers(node.inputs[1]) if is_op(node, "Unsqueeze") and len(node.inputs) > 1 else None
    return axes in ((-1,), (2,)) and not node.outputs[0].is_graph_output()


def _reduces_all(node: ir.Node) -> bool:
    return is_op(node, "ReduceMax") and len(node.inputs) == 1 and node.attributes.get_int("keepdims", 1) == 0
