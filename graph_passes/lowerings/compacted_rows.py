"""Where a layer's active tokens are, and how rows of theirs come back to the stream: compaction's two ends."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import layer_tensor_name, router_path
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_node


def row_count(masked: MaskedBlock) -> str:
    """Name of the number of a layer's active tokens."""
    return f"active_tokens_{masked.layer.index}"


def active_index(graph: ir.Graph, masked: MaskedBlock, made_by: str, before: ir.Node) -> ir.Value:
    """Where the active tokens are, int64 [count, 2]: computed once per layer, whatever of it is routed.

    Args:
        graph: Holds the layer.
        masked: A block of it.
        made_by: Name of the pass.
        before: Where the nodes are inserted on first use.
    """
    router, int64, count = router_path(masked.layer.index), ir.DataType.INT64, row_count(masked)
    tags = TaggedNodes(made_by, masked.layer.index).tags
    name = f"{router}.nonzero"
    nonzero = shared_node(
        graph, "NonZero", masked.active, name=name, tags=tags, dtype=int64, shape=(2, count), before=before
    )
    name = f"{router}.index"
    return shared_node(
        graph, "Transpose", nonzero, name=name, tags=tags, dtype=int64, shape=(count, 2), before=before, perm=(1, 0)
    )


def put_rows_back(
    graph: ir.Graph,
    masked: MaskedBlock,
    scatter: TaggedNodes,
    stream: ir.Value,
    gathered: ir.Value,
    index: ir.Value,
    kept: ir.Value,
) -> None:
    """Adds to the stream's rows in place of the block's addition, which is gone with what served only it.

    Args:
        graph: Holds the block.
        masked: The block.
        scatter: Nodes that lead to `kept`; the one that closes the block comes behind them.
        stream: For all tokens.
        gathered: Rows of what the block reads, [count, hidden].
        index: Of the rows, as `active_index` gives it.
        kept: The rows, [count, hidden].
    """
    block, part = masked.layer.mlp, "mlp"
    if isinstance(masked, MaskedAttention):
        block, part = masked.layer.attention, "self_attn"
    name, dtype = layer_tensor_name(masked.layer.index, part), element_type(block.stream_operand)
    # The sum is made on rows and then put in the stream's place. ScatterND could add by itself, but not in every type:
    # ONNX Runtime adds no float16 on a CPU and no bfloat16 on CUDA.
    own, shape = gathered, gathered.shape
    if stream is not block.stream_in:
        own = scatter.add("GatherND", stream, index, name=f"{name}.stream_rows", dtype=dtype, shape=shape)
    added = scatter.add("Add", own, kept, name=f"{name}.added_rows", dtype=dtype, shape=shape)
    total = scatter.add(
        "ScatterND",
        stream,
        index,
        added,
        name=block.stream_out.name or f"{name}.rows_put_back",
        dtype=dtype,
        shape=block.stream_out.shape,
        closes=2,
    )
    graph.insert_before(block.add, scatter.nodes)
    replace_value(block.stream_out, total)
    remove_with_sources(graph, block.add)
