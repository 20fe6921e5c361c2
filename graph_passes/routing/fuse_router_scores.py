"""Compute a router's score in one operator, where the library of the dlo operators is needed anyway."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import constant_tensor, is_op
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import DOMAIN, ROUTER, VERSION
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import ROUTER_SCORES, TaggedNodes, role_values


@dataclasses.dataclass(frozen=True)
class FuseRouterScoresPass(GraphPass):
    """Replace the nodes from a layer's stream to its router's score by `dlo::RouterScores`.

    Before::

        scores = Sigmoid(Squeeze(MatMul(Cast(x), w), -1))    # w [hidden, 1], float32; no Cast where x is float32

    After::

        scores = dlo::RouterScores(x, w)

    On a GPU, where a decode step's smallest kernels take a microsecond or two each, four of a routed layer's go. Scope:
    routers of the main graph in the form RouteLayersPass writes; others are left alone. Source:
    graph_passes/spec/ops.py.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, LoweringPass)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Fuses every router's nodes."""
        graph, fused = model.graph, False
        for layer, scores in sorted(role_values(graph, ROUTER_SCORES).items()):
            found = router_operands(scores)
            if found is None:
                continue
            graph.opset_imports[DOMAIN] = VERSION
            old = scores.producer()
            assert old is not None, "a tagged node computes it"
            lookup: dict[str, Any] = dict(ROUTER.attributes)
            new, name = TaggedNodes(self._name, layer), scores.name or ""
            value = new.add(
                ROUTER.name,
                *found,
                name=f"{name}.fused",
                dtype=ir.DataType.FLOAT,
                shape=scores.shape,
                role=ROUTER_SCORES,
                domain=DOMAIN,
                **lookup,
            )
            graph.insert_before(old, new.nodes)
            scores.replace_all_uses_with(value, replace_graph_outputs=True)
            remove_with_sources(graph, old)
            value.name, fused = name, True
        return fused


def router_operands(scores: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The stream, of any type, and the router's weight; None where the score is computed otherwise."""
    node = scores.producer()
    for op in ("Sigmoid", "Squeeze"):
        if node is None or not is_op(node, op) or node.inputs[0] is None:
            return None
        node = node.inputs[0].producer()
    if node is None or not is_op(node, "MatMul"):
        return None
    stream, weight = node.inputs
    tensor = constant_tensor(weight)
    if stream is None or weight is None or tensor is None or len(tensor.shape) != 2 or tensor.shape[1] != 1:
        return None
    cast = stream.producer()
    source = cast.inputs[0] if cast is not None and is_op(cast, "Cast") else stream
    return None if source is None else (source, weight)
