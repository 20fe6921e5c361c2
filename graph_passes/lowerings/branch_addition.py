"""The addition that closes a routed block, made anew so that a branch can hold it."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes


def renew_addition(graph: ir.Graph, masked: MaskedBlock, block: ResidualBlock, name: str, made_by: str) -> ir.Node:
    """Puts an addition of a pass's own in place of the one that closes a block.

    Args:
        graph: Holds the block.
        masked: The block's masked form.
        block: Its addition is replaced, and gives the stream under another name.
        name: Of the sum.
        made_by: Name of the pass.

    Returns:
        The new addition, which says which of its inputs carries the branch.
    """
    nodes, operands = (
        TaggedNodes(made_by, masked.layer.index),
        [value for value in block.add.inputs if value is not None],
    )
    added = nodes.add(
        "Add",
        *operands,
        name=name,
        dtype=element_type(block.stream_operand),
        shape=(*masked.layer.token_dims, masked.layer.hidden_size),
        closes=operands.index(block.branch),
    )
    (addition,) = nodes.nodes
    graph.insert_before(block.add, addition)
    replace_value(block.stream_out, added)
    graph.remove(block.add, safe=True)
    return addition
