"""Active tokens by where they are: compaction's rows on ONNX Runtime."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import router_path
from dlo_export.graph_passes.find.data_flow import element_type, producer_of
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.lowerings.active_rows import RowAccess
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.spec.provenance import CLOSES_KEY, TaggedNodes, shared_node

_REDUCES = 16  # opset from which on ScatterND adds


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
            path, dims = masked.path, (2, self.count)
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
        block, path = self.masked.block, self.masked.path
        dtype, shape = element_type(block.stream_operand), kept.shape
        # The sum is made on rows and then put in the stream's place. Where no rows of the stream are at hand, ScatterND
        # adds by itself, which saves gathering them; not in every type: ONNX Runtime adds no float16 on a CPU and no
        # bfloat16 on CUDA.
        how: dict[str, Any] = {}
        if rows is None and dtype == ir.DataType.FLOAT and self.graph.opset_imports.get("", 0) >= _REDUCES:
            added, how = kept, {"reduction": "add"}
        else:
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
            **how,
        )
        self.close(nodes, total)


def pass_rows_on(first: CompactedRows, second: CompactedRows) -> None:
    """Lets the second block of a layer read the rows that the first one gives, if no one else reads the stream between.

    Before::

        h = ScatterND(x, idx, Add(GatherND(x, idx), a))     # closes the first block
        r = GatherND(h, idx)
        y = ScatterND(h, idx, Add(r, m))

    After::

        r = Add(GatherND(x, idx), a)                        # closes the first block
        y = ScatterND(x, idx, Add(r, m))

    Args:
        first: Of the block in front, which has added its rows.
        second: Of the block behind it, by the same index.
    """
    closing, put_back = first.nodes[-1], second.nodes[-1]
    stream, index, sums = closing.inputs
    total, added = closing.outputs[0], producer_of(sums)
    gathers = [node for node in second.nodes if node.op_type == "GatherND" and list(node.inputs) == [total, index]]
    if sums is None or added is None or added.op_type != "Add":
        return
    if total.is_graph_output() or {*total.consumers()} != {*gathers, put_back}:
        return
    # The first block is closed by the addition now: of its two operands the branch is the one that it had before.
    for gather in gathers:
        gather.outputs[0].replace_all_uses_with(sums)
    put_back.replace_input_with(0, stream)
    added.metadata_props[CLOSES_KEY] = "1"  # `RowAccess.add` lists the rows first
    first.graph.remove([*gathers, closing], safe=True)
