"""Renumber decoder layers in the names of a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import onnx_ir as ir

# `model.layers.1.mlp`, `/model/layers.1/mlp` and a name that ends in the number; not `layers.11`, not `my_layers.1`.
_LAYER_NUMBER = re.compile(r"(?<![A-Za-z0-9_])layers\.(\d+)(?=[./]|$)")
_CACHE_NUMBER = re.compile(r"^(past_key_values|present)\.(\d+)\.(?=key$|value$)")


def renumbered(name: str, numbers: Mapping[int, int]) -> str:
    """The name with its layer number replaced, all numbers at once; numbers not in the mapping stay."""
    name = _LAYER_NUMBER.sub(lambda match: f"layers.{_mapped(match[1], numbers)}", name)
    return _CACHE_NUMBER.sub(lambda match: f"{match[1]}.{_mapped(match[2], numbers)}.", name)


def _mapped(number: str, numbers: Mapping[int, int]) -> int:
    return numbers.get(int(number), int(number))


def renumber_layers(graph: ir.Graph, numbers: Mapping[int, int]) -> None:
    """Rename every node, value and initializer of the graph and its subgraphs that carries a layer number."""
    values = [*graph.inputs, *graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.name is not None:
            node.name = renumbered(node.name, numbers)
        values.extend(node.outputs)
    old = {value: value.name for value in values if value.name is not None}
    new = {value: renumbered(name, numbers) for value, name in old.items()}
    changed = [value for value in old if new[value] != old[value]]
    ir.convenience.rename_values(changed, [new[value] for value in changed])


def unique_names(graph: ir.Graph) -> Callable[[str], str]:
    """A function that makes names unique in the graph, remembering what it returned."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        taken.update((node.name, *(output.name for output in node.outputs)))

    def unique(name: str) -> str:
        candidate, number = name, 1
        while candidate in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate)
        return candidate

    return unique
