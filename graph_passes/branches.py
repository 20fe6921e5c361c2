"""Put nodes of a graph into the branches of an If."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

Branch = tuple[Sequence[ir.Node], Sequence[ir.Value]]
"""Nodes and outputs of one."""


def conditional_node(
    graph: ir.Graph,
    name: str,
    condition: ir.Value,
    then: Branch,
    otherwise: Branch,
    outputs: Sequence[ir.Value],
    tags: Mapping[str, str],
) -> ir.Node:
    """An If, in no graph yet; its nodes leave the one they stand in.

    Args:
        graph: Holds nodes of the branches.
        name: Of the If and its branches.
        condition: bool of one element.
        then: Nodes and outputs of one branch.
        otherwise: Those of the other.
        outputs: What the If gives out.
        tags: Its metadata.
    """
    branches = {}
    for branch, (nodes, values) in (("then_branch", then), ("else_branch", otherwise)):
        graph.remove([node for node in nodes if node.graph is graph])
        branches[branch] = ir.Graph([], list(values), nodes=list(nodes), name=f"{name}.{branch}")
    return ir.node("If", [condition], branches, outputs=list(outputs), name=f"{name}.if", metadata_props=dict(tags))
