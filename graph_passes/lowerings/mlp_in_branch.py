"""Move a masked MLP, whatever a lowering has made of it, into a branch of an If."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from dlo_export.graph_passes.branches import conditional_node
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import Dims, TaggedNodes


def dequantised_outside(masked: MaskedBlock) -> ir.Node | None:
    """A node that dequantises a weight of the block, and does not belong to it: no branch can leave it out.

    Outside of the branch it runs in every step; inside, ONNX Runtime 1.32 fuses it with the MatMul that reads it, and
    refuses to load a graph where the weight is not an initializer of the subgraph they stand in.
    """
    sources = [value.producer() for node in masked.nodes for value in node.inputs if value is not None]
    outside = [source for source in sources if source is not None and source not in masked.nodes]
    return next((source for source in outside if is_op(source, "DequantizeLinear")), None)


def add_skip(masked: MaskedBlock, made_by: str) -> TaggedNodes:
    """The other branch: the stream as the addition reads it, cast where the operand is."""
    # The addition may read a cast of the stream: both branches must give the same type, so the cast is repeated here.
    block, shape = masked.block, (*masked.layer.token_dims, masked.layer.hidden_size)
    nodes, value = TaggedNodes(made_by, masked.layer.index), block.stream_in
    for cast in (node for node in block.operand_nodes if is_op(node, "Cast")):
        source, to = cast.outputs[0], cast.attributes["to"].as_int()
        name = f"{source.name}.skipped"
        value = nodes.add("Cast", value, name=name, dtype=ir.DataType(to), shape=shape, to=to)
    name = f"{masked.path}.skipped_output"
    nodes.add("Identity", value, name=name, dtype=element_type(block.stream_operand), shape=shape)
    return nodes


def close_mlp_in_branch(
    graph: ir.Graph, masked: MaskedMlp, condition: ir.Value, nodes: Sequence[ir.Node], skip: TaggedNodes
) -> None:
    """Puts an If in place of nodes: it computes them, or passes on the stream.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        masked: The MLP.
        condition: bool, 0-D: whether they are computed.
        nodes: All that serve active tokens only; the last one gives the stream behind the block.
        skip: What is computed otherwise, as `add_skip` has made it before the addition was replaced.
    """
    mlp, output, skipped = masked.path, nodes[-1].outputs[0], skip.nodes[-1].outputs[0]
    shape: Dims = (*masked.layer.token_dims, masked.layer.hidden_size)
    # The If gives the stream under its name; the branch's own value gets another.
    result = ir.Value(type=output.type, shape=ir.Shape(shape))
    replace_value(output, result)
    output.name = f"{mlp}.active_output"
    then, otherwise = (nodes, [output]), (skip.nodes, [skipped])
    graph.append(conditional_node(graph, mlp, condition, then, otherwise, [result], skip.tags))
