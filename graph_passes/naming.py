"""Names that no two things share."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from dlo_export.checkpoints.interface import is_interface_name
from dlo_export.graph_passes.find.data_flow import subgraphs_of


def unique_names(graph: ir.Graph) -> Callable[[str], str]:
    """A function that makes names unique in the graph, remembering what it returned."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        taken.update((node.name, *(output.name for output in node.outputs)))
    for subgraph in graph.subgraphs():
        taken.update(value.name for value in (*subgraph.inputs, *subgraph.initializers.values()))

    numbers: dict[str, int] = {}

    def unique(name: str) -> str:
        candidate, number = name, numbers.get(name, 1)
        while candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        # Where all nodes have one name, each would try all numbers again.
        numbers[name] = number
        taken.add(candidate)
        return candidate

    return unique


def make_value_names_unique(graph: ir.Graph) -> bool:
    """Renames values until none has the name of another one that is visible where it is.

    The graph's interface keeps its names, then initializers do, then what is computed first.

    Returns:
        Whether anything was renamed.
    """
    return _settle(graph, frozenset(), unique_names(graph))


def free_interface_names(graph: ir.Graph) -> bool:
    """Renames values inside the graph that have a name of the interface, such as the cache of a layer to come.

    Returns:
        Whether anything was renamed.
    """
    unique = unique_names(graph)
    inner = [*graph.initializers.values(), *(output for node in graph.all_nodes() for output in node.outputs)]
    taken = [value for value in inner if is_interface_name(value.name or "") and not _is_interface(value, graph)]
    for value in taken:
        value.name = unique(f"{value.name}.inner")
    return bool(taken)


def make_node_names_unique(graph: ir.Graph) -> bool:
    """Gives a name to nodes that have none, and another one to those that share it.

    Returns:
        Whether anything was renamed.
    """
    unique, taken, changed = unique_names(graph), set[str](), False
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if not node.name or node.name in taken:
            node.name, changed = unique(node.name or node.op_type), True
        taken.add(node.name)
    return changed


def _is_interface(value: ir.Value, graph: ir.Graph) -> bool:
    return value in graph.inputs or value in graph.outputs


def _settle(graph: ir.Graph, outer: Collection[str], unique: Callable[[str], str]) -> bool:
    computed = [output for node in graph for output in node.outputs]
    # An output that is not computed here stands for a value of an outer graph, which settles its name.
    own = {*graph.inputs, *graph.initializers.values(), *computed}
    interface = [*graph.inputs, *(value for value in graph.outputs if value in own)]
    taken, changed = set(outer), False
    for value in dict.fromkeys((*interface, *graph.initializers.values(), *computed)):
        if not value.name:  # an output that the node is not asked for
            continue
        if value.name in taken:
            value.name, changed = unique(value.name), True
        taken.add(value.name)
    for node in graph:
        for subgraph in subgraphs_of(node):
            changed = _settle(subgraph, taken, unique) or changed
    return changed
