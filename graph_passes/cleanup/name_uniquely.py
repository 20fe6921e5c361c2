"""Give every node and value a name of its own."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.naming import free_interface_names, make_node_names_unique, make_value_names_unique
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class NameUniquelyPass(GraphPass):
    """Name nodes that have no name or that of another node, rename values that hide one of an outer graph.

    Before::

        h = Add (x, a)                          # no name
        y = If (c) <then_branch = { h = Add (x, b) }, …>

    After::

        [Add] h = Add (x, a)
        [If] y = If (c) <then_branch = { [Add_1] h_1 = Add (x, b) }, …>

    Passes name new nodes after old ones, and messages say where something is by names. A value inside the graph that
    is called as an input or output of a layer to come (`present.7.key`) makes way for it. Optional: a graph whose names
    are unique is left alone. Scope: main graph and subgraphs; the names of inputs and outputs stay.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Rename what has to be."""
        steps = (free_interface_names, make_node_names_unique, make_value_names_unique)
        changed = [step(model.graph) for step in steps]
        return any(changed)
