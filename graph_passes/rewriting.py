"""Take values and nodes out of a graph, with whatever served only them."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import subgraphs_of


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Everybody who read `old`, the graph's outputs included, reads `new`, which takes its name.

    `old` keeps its producer until that is removed; until then it has another name, since no two may share one.
    """
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if name is not None:
        old.name = f"{name}.replaced"
        new.name = name


def remove_with_sources(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node and whatever only served it: the Where, the Unsqueeze of its condition, the zero."""
    # Noted first: a removed node has no inputs. Then backwards, as far as nobody else reads.
    operands = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in operands:
        source = value.producer()
        if value.uses() or value.is_graph_output() or value.name is None:
            continue
        if value.is_initializer() and not value.is_graph_input():
            graph.initializers.pop(value.name, None)
        elif source is not None and not _is_read(source):
            remove_with_sources(graph, source)


def remove_unused(graph: ir.Graph) -> None:
    """Remove what computes nothing any more: nodes, initializers."""
    # From the back, so that a chain whose end is unused goes in one sweep.
    for node in reversed(list(graph)):
        if not _is_read(node):
            graph.remove(node, safe=True)
            for subgraph in subgraphs_of(node):
                _empty(subgraph)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _is_read(node: ir.Node) -> bool:
    """Whether another node, or whoever runs the graph, reads one of its outputs."""
    return any(output.uses() or output.is_graph_output() for output in node.outputs)


def _empty(subgraph: ir.Graph) -> None:
    """Takes the nodes out of a branch that is gone: the graph around it would go on computing what they captured."""
    subgraph.outputs.clear()
    for node in reversed(list(subgraph)):
        subgraph.remove(node, safe=True)
        for inner in subgraphs_of(node):
            _empty(inner)
