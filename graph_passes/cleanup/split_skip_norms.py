"""Undo the fusion of residual additions with the norms behind them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY

FUSED = "SkipSimplifiedLayerNormalization"


@dataclasses.dataclass(frozen=True)
class SplitSkipNormsPass(GraphPass):
    """Give every residual addition a node of its own, as the passes on decoder layers need it.

    Before::

        n, _, _, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon> (x, branch, weight, bias?)

    After::

        s = Add(x, branch)                          # branch = Add(branch, bias) first where there is a bias
        n = RMSNormalization <axis=-1> (s, weight)  # SimplifiedLayerNormalization before opset 23

    Optional: a graph without such nodes is left alone. Scope: main graph. Graphs of onnxruntime-genai's builder and of
    mobius have them. Source: ONNX Runtime's contrib operators.
    """

    nodes_from: ClassVar[Border | None] = "plain"

    def rewrite(self, model: ir.Model) -> bool:
        """Split every fused node."""
        fused = [node for node in model.graph if is_op(node, FUSED, domain="com.microsoft")]
        for node in fused:
            _split(model.graph, node)
        return bool(fused)


def _split(graph: ir.Graph, node: ir.Node) -> None:
    # The sum becomes a node of its own, which is the stream; the norm reads it. A bias is part of the branch.
    stream, branch, weight, *rest = node.inputs
    nodes: list[ir.Node] = []
    if rest and rest[0] is not None:
        nodes.append(_new_node("Add", [branch, rest[0]], f"{node.name}/add_bias", node.outputs[0]))
        branch = nodes[-1].outputs[0]
    nodes.append(_new_node("Add", [stream, branch], f"{node.name}/add", node.outputs[0]))
    op_type = "RMSNormalization" if graph.opset_imports.get("", 0) >= 23 else "SimplifiedLayerNormalization"
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12), "stash_type": 1}
    norm = _new_node(op_type, [nodes[-1].outputs[0], weight], f"{node.name}/norm", node.outputs[0], attributes)
    graph.insert_before(node, [*nodes, norm])
    # Output 0 is the norm's; output 3, where it is asked for, the sum. Nobody reads 1 and 2, mean and variance.
    for old, new in (
        (node.outputs[0], norm.outputs[0]),
        *((output, nodes[-1].outputs[0]) for output in node.outputs[3:]),
    ):
        replace_value(old, new)
    graph.remove(node, safe=True)


def _new_node(
    op_type: str,
    inputs: list[ir.Value | None],
    name: str,
    like: ir.Value,
    attributes: dict[str, int | float] | None = None,
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes or {}, name=name, metadata_props={PASS_KEY: SplitSkipNormsPass.__name__})
    node.outputs[0].name, node.outputs[0].type = f"{name}/output_0", like.type
    node.outputs[0].shape = None if like.shape is None else like.shape.copy()
    return node
