"""Renumber decoder layers in the names of a graph."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from dlo_export.checkpoints.interface import renumbered_name
from dlo_export.checkpoints.llama_layer import LAYER_NUMBER
from dlo_export.graph_passes.naming import unique_names

# `model.layers.1.mlp`, `/model/layers.1/mlp` and a name that ends in the number; not `layers.11`, not `my_layers.1`.
_LAYER_NUMBER = re.compile(rf"(?<![A-Za-z0-9_])layers\.{LAYER_NUMBER}(?=[./]|$)")


def renumbered(name: str, numbers: Mapping[int, int]) -> str:
    """The name with its layer number replaced, all numbers at once; numbers not in the mapping stay."""
    if (state := renumbered_name(name, numbers)) is not None:
        return state
    return _LAYER_NUMBER.sub(lambda match: f"layers.{numbers.get(int(match[1]), int(match[1]))}", name)


def renumber_layers(graph: ir.Graph, numbers: Mapping[int, int]) -> None:
    """Rename every node, value and initializer of the graph and its subgraphs that carries a layer number."""
    values = [*graph.inputs, *graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.name is not None:
            node.name = renumbered(node.name, numbers)
        values.extend(node.outputs)
    # All at once: layer 1 becomes 2 while layer 2 becomes 3, and on the way no two values may share a name.
    old = {value: value.name for value in values if value.name is not None}
    new = {value: renumbered(name, numbers) for value, name in old.items()}
    changed = [value for value in old if new[value] != old[value]]
    # A graph of three layers may hold a `layers.5` that is no layer of its: it makes way.
    unique, wanted = unique_names(graph), {new[value] for value in changed}
    for value in old.keys() - set(changed):
        if value.name in wanted and not value.is_graph_input() and not value.is_graph_output():
            value.name = unique(value.name)
    ir.convenience.rename_values(changed, [new[value] for value in changed])
