"""Active tokens by where they are: compaction's rows on ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import router_path
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.lowerings.active_rows import RowAccess, block_path, residual_block, token_zeros
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_node


class CompactedRows(RowAccess):
    """By NonZero, GatherND and ScatterND, which adds.

    Args:
        graph: Holds the layer.
        masked: A block of it.
        made_by: Name of the pass.
        before: Where the index is computed on first use: once per layer, whatever of it is routed.
        own: Compute the index for this block alone, among its `nodes`.
        like: The rows of another block of the layer, whose index serves this one too.
    """

    def __init__(
        self,
        graph: ir.Graph,
        masked: MaskedBlock,
        made_by: str,
        before: ir.Node,
        *,
        own: bool = False,
        like: CompactedRows | None = None,
    ) -> None:
        super().__init__(graph, masked, made_by)
        router, int64, new = router_path(masked.layer.index), ir.DataType.INT64, self.new_nodes()
        self._index: ir.Value
        if like is not None:
            self._index = like._index
            return
        if own:
            path, dims = block_path(masked), (2, self.count)
            places = new.add("NonZero", masked.active, name=f"{path}.nonzero", dtype=int64, shape=dims)
            self._index = new.add("Transpose", places, name=f"{path}.index", dtype=int64, shape=dims[::-1], perm=(1, 0))
            graph.insert_before(before, new.nodes)
            return
        tags = new.tags
        nonzero = shared_node(
            graph,
            "NonZero",
            masked.active,
            name=f"{router}.nonzero",
            tags=tags,
            dtype=int64,
            shape=(2, self.count),
            before=before,
        )
        # Where the active tokens are, int64 [count, 2].
        self._index = shared_node(
            graph,
            "Transpose",
            nonzero,
            name=f"{router}.index",
            tags=tags,
            dtype=int64,
            shape=(self.count, 2),
            before=before,
            perm=(1, 0),
        )

    def gather(self, nodes: TaggedNodes, value: ir.Value, width: int | None, name: str) -> ir.Value:  # noqa: D102
        dtype, shape = element_type(value), (self.count,) if width is None else (self.count, width)
        return nodes.add("GatherND", value, self._index, name=name, dtype=dtype, shape=shape if dtype else None)

    def spread(self, nodes: TaggedNodes, rows: ir.Value, width: int, name: str, before: ir.Node) -> ir.Value:  # noqa: D102
        dtype, shape = element_type(rows), (*self.masked.layer.token_dims, width)
        assert dtype is not None, "asked before anything is lowered"
        zeros = token_zeros(self.graph, self.made_by, width, dtype, before)
        return nodes.add("ScatterND", zeros, self._index, rows, name=name, dtype=dtype, shape=shape)

    def add(self, nodes: TaggedNodes, stream: ir.Value, rows: ir.Value | None, kept: ir.Value) -> None:  # noqa: D102
        block, path = residual_block(self.masked), block_path(self.masked)
        dtype, shape = element_type(block.stream_operand), kept.shape
        # The sum is made on rows and then put in the stream's place. ScatterND could add by itself, but not in every
        # type: ONNX Runtime adds no float16 on a CPU and no bfloat16 on CUDA.
        if rows is None:
            rows = nodes.add("GatherND", stream, self._index, name=f"{path}.stream_rows", dtype=dtype, shape=shape)
        added = nodes.add("Add", rows, kept, name=f"{path}.added_rows", dtype=dtype, shape=shape)
        total = nodes.add(
            "ScatterND",
            stream,
            self._index,
            added,
            name=block.stream_out.name or f"{path}.rows_put_back",
            dtype=dtype,
            shape=block.stream_out.shape,
            closes=2,
        )
        self.close(nodes, total)
