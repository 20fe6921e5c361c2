"""Compute a router's score in one operator, where the library of the dlo operators is needed anyway."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.routers import router_operands
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
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
            new = TaggedNodes(self._name, layer)
            value = new.add(
                ROUTER.name,
                *found,
                name=f"{scores.name}.fused",
                dtype=ir.DataType.FLOAT,
                shape=scores.shape,
                role=ROUTER_SCORES,
                domain=DOMAIN,
                **lookup,
            )
            graph.insert_before(old, new.nodes)
            replace_value(scores, value)
            remove_with_sources(graph, old)
            fused = True
        return fused
