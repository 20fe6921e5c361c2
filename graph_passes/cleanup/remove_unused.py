"""Remove what nothing reads."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class RemoveUnusedPass(GraphPass):
    """Remove nodes, initializers and inputs that nothing reads.

    Before::

        (x, unused) => (y)
        <w = …, left_over = …>
        forgotten = Neg (x)
        y = MatMul (x, w)

    After::

        (x) => (y)
        <w = …>
        y = MatMul (x, w)

    Exporters leave such things behind; an addition that nobody reads would look like a fork of the residual stream.
    Optional: a graph that uses all it has is left alone. Scope: main graph; a subgraph's nodes stay.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Remove all of it."""
        graph = model.graph
        before = len(graph) + len(graph.initializers) + len(graph.inputs)
        remove_unused(graph)
        graph.inputs[:] = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
        return len(graph) + len(graph.initializers) + len(graph.inputs) < before
