"""What must hold for a graph: each check yields its violations, with their places."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import consumed_values, subgraphs_of


def unused_inputs(graph: ir.Graph) -> Iterator[str]:
    """Graph inputs that nothing reads."""
    for value in graph.inputs:
        if not value.uses() and not value.is_graph_output():
            yield f"graph input '{value.name}' has no consumer"


def misordered_values(graph: ir.Graph) -> Iterator[str]:
    """Values that come from nowhere or too late: nodes in a cycle, or not in the order of execution."""
    yield from _misordered_scope(graph, frozenset())


def broken_values(graph: ir.Graph) -> Iterator[str]:
    """Values that come from nowhere or too late, names given twice, initializers without contents or readers."""
    yield from _misordered_scope(graph, frozenset())
    yield from _broken_names(graph, frozenset())


def _misordered_scope(graph: ir.Graph, outer: frozenset[ir.Value]) -> Iterator[str]:
    """Of a graph that sees outer values, and of its subgraphs (branches of one If do not see each other)."""
    known = {*outer, *graph.inputs, *graph.initializers.values()}
    # In the order of execution: a value is known from the node that computes it on, an outer one from the start.
    for node in graph:
        consumed = frozenset(consumed_values(node))
        for value in consumed - known:
            yield f"{place(node)} reads '{value.name}' before it is computed"
        for subgraph in subgraphs_of(node):
            # What the subgraph misses has just been reported, as a read of the node.
            yield from _misordered_scope(subgraph, consumed | known)
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            yield f"output '{value.name}' of graph '{graph.name}' is not computed"


def _broken_names(graph: ir.Graph, outer_names: frozenset[str]) -> Iterator[str]:
    own = {*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)}
    names = collections.Counter(value.name for value in own if value.name)
    for node in graph:
        for subgraph in subgraphs_of(node):
            yield from _broken_names(subgraph, outer_names | names.keys())
    names.update(names.keys() & outer_names)
    yield from (f"name '{name}' is given to {count} values" for name, count in names.items() if count > 1)
    for name, value in graph.initializers.items():
        if value.const_value is None:
            yield f"initializer '{name}' has no contents"
        if not value.uses() and not value.is_graph_output():
            yield f"initializer '{name}' has no consumer"


def foreign_branch_outputs(graph: ir.Graph) -> Iterator[str]:
    """Outputs of subgraphs that are computed outside of them: runtimes reject those."""
    for subgraph in graph.subgraphs():
        inner = {output for node in subgraph for output in node.outputs} | set(subgraph.initializers.values())
        for value in subgraph.outputs:
            if value not in inner:
                yield f"output '{value.name}' of subgraph '{subgraph.name}' is not computed inside it"
