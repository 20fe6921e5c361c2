"""Find the active tokens' rows in one operator, where the library of the dlo operators is needed anyway."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import constant_scalar, element_type, is_op
from dlo_export.graph_passes.find.routers import router_operands
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE, VERSION
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import ROLE_KEY, ROUTER_SCORES, SERVES_KEY, role_values


@dataclasses.dataclass(frozen=True)
class FuseRouterGatherPass(GraphPass):
    """Replace the nodes from a layer's stream to its active tokens' rows by `dlo::GatherActive`.

    Before::

        scores = Sigmoid(Squeeze(MatMul(x, w), -1))          # w [hidden, 1], float32
        idx    = Transpose(NonZero(Greater(scores, 0.5)))    # int64 [n, 2]
        rows   = GatherND(n, idx)                            # [n, hidden]

    After::

        scores, idx, rows = dlo::GatherActive(x, w, 0.5, n)

    In a decode step each small operator costs a CPU a microsecond or more, whatever it does: one stands in place of
    seven of the eight that compaction adds to a layer.

    Optional: decisions that somebody else reads, routers in another form and types other than float32 are left alone.
    Scope: routers of the main graph in the form RouteLayersPass writes. Source: graph_passes/spec/ops.py.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, LoweringPass)

    def rewrite(self, model: ir.Model) -> bool:
        """Fuses every router whose decision is used for gathering alone."""
        graph, fused = model.graph, False
        for scores in role_values(graph, ROUTER_SCORES).values():
            if (found := _match(scores)) is not None:
                graph.opset_imports[DOMAIN] = VERSION
                _fuse(graph, scores, found)
                fused = True
        if fused:
            graph.sort()  # the operator stands where rows were gathered; others may have read the index before
        return fused


@dataclasses.dataclass(frozen=True)
class _Gathering:
    """The operator's inputs, and the node whose output the index is, and the one that gathers by it."""

    inputs: tuple[ir.Value, ir.Value, ir.Value, ir.Value]
    index: ir.Node
    gather: ir.Node


def _match(scores: ir.Value) -> _Gathering | None:
    operands = router_operands(scores)
    decisions = [node for node in scores.consumers() if is_op(node, "Greater") and node.inputs[0] is scores]
    if operands is None or len(decisions) != 1:
        return None
    threshold, places = decisions[0].inputs[1], _only_reader(decisions[0])
    index = _only_reader(places) if is_op(places, "NonZero") else None
    if threshold is None or constant_scalar(threshold) is None or not is_op(index, "Transpose"):
        return None
    # By the same index scales may be gathered, which have no width.
    gathers = [node for node in index.outputs[0].consumers() if is_op(node, "GatherND")]
    for gather in gathers:
        value, shape = gather.inputs[0], gather.outputs[0].shape
        if value is not None and shape is not None and len(shape) == 2 and _is_float(operands[0], value):
            return _Gathering((*operands, threshold, value), index, gather)
    return None


def _only_reader(node: ir.Node | None) -> ir.Node | None:
    """The one node that reads a node's one output, where nobody else does."""
    uses = () if node is None or node.outputs[0].is_graph_output() else tuple(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 else None


def _is_float(*values: ir.Value) -> bool:
    return all(element_type(value) == ir.DataType.FLOAT for value in values)


def _fuse(graph: ir.Graph, scores: ir.Value, found: _Gathering) -> None:
    # It gathers for the lowering, and keeps its tags: a graph's lowering is known by them.
    tags = {**found.gather.metadata_props, ROLE_KEY: ROUTER_SCORES, SERVES_KEY: "router"}
    # The scores come first: by a node's first output others know what plays a role.
    replaced = (scores, found.index.outputs[0], found.gather.outputs[0])
    node = ir.node(
        GATHER_ACTIVE.name,
        found.inputs,
        domain=DOMAIN,
        num_outputs=len(replaced),
        name=f"{scores.name}.gather_active",
        metadata_props=tags,
    )
    graph.insert_before(found.gather, node)
    score_node = scores.producer()
    assert score_node is not None, "a tagged node computes it"
    for old, new in zip(replaced, node.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        replace_value(old, new)
    for last in (found.gather, found.index, score_node):
        remove_with_sources(graph, last)
