"""The addition that closes a routed block, made anew so that a branch can hold it."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes


def renew_addition(graph: ir.Graph, masked: MaskedBlock, made_by: str) -> ir.Node:
    """Puts an addition of a pass's own in place of the one that closes a block.

    Args:
        graph: Holds the block.
        masked: The block, whose old addition is removed.
        made_by: Name of the pass.

    Returns:
        The new addition, which says which of its inputs carries the branch.
    """
    block, nodes = masked.block, TaggedNodes(made_by, masked.layer.index)
    operands = [value for value in block.add.inputs if value is not None]
    added = nodes.add(
        "Add",
        *operands,
        name=f"{masked.path}.added",
        dtype=element_type(block.stream_operand),
        shape=(*masked.layer.token_dims, masked.layer.hidden_size),
        closes=operands.index(block.branch),
    )
    (addition,) = nodes.nodes
    graph.insert_before(block.add, addition)
    replace_value(block.stream_out, added)
    graph.remove(block.add, safe=True)
    return addition
