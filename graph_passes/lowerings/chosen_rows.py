"""Active tokens as TopK chooses them: compaction's rows on TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.lowerings.active_rows import RowAccess
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.spec.provenance import PASS_KEY, TaggedNodes, shared_constant, shared_node

MOST_SELECTED = 3840  # TensorRT's largest K of one TopK


class ChosenRows(RowAccess):
    """By TopK, Gather and ScatterND, all tokens of a step in one row: to what runs on rows, sequences are alike.

    Args:
        graph: Holds the layer.
        masked: A block of it.
        made_by: Name of the pass.
        chunks: How many TopK each layer has.
        before: Where the indices are computed on first use: once per layer, whatever of it is routed.
    """

    def __init__(self, graph: ir.Graph, masked: MaskedBlock, made_by: str, chunks: int, before: ir.Node) -> None:
        super().__init__(graph, masked, made_by)
        self.router, self._chunks, self._index_nodes = router_path(masked.layer.index), chunks, self.new_nodes()
        self._flats: dict[ir.Value, ir.Value] = {}
        known = f"{self.router}.{'chosen' if chunks == 1 else 'active_tokens'}"
        found = (node.outputs[0] for node in graph if node.name == known and node.metadata_props[PASS_KEY] == made_by)
        self._index = next(found, None) or self._active_tokens()
        graph.insert_before(before, self._index_nodes.nodes)

    def gather(self, nodes: TaggedNodes, value: ir.Value, width: int | None, name: str) -> ir.Value:  # noqa: D102
        flat = self._flat(nodes, value, width, f"{name}_flat")
        dtype, shape = element_type(value), (self.count,) if width is None else (self.count, width)
        return nodes.add("Gather", flat, self._index, name=name, dtype=dtype, shape=shape if dtype else None)

    def spread(self, nodes: TaggedNodes, rows: ir.Value, width: int, name: str, before: ir.Node) -> ir.Value:  # noqa: D102
        dtype = element_type(rows)
        assert dtype is not None, "asked before anything is lowered"
        zeros = token_zeros(self.graph, self.made_by, width, dtype, before)
        flat = shared_node(
            self.graph,
            "Reshape",
            zeros,
            self._constant(f"flat_{width}", [-1, width]),
            name=f"{zeros.name}_flat",
            tags=TaggedNodes(self.made_by, None).tags,
            dtype=dtype,
            shape=("tokens", width),
            before=before,
        )
        placed = self._scattered(nodes, flat, rows, width, f"{name}_flat")
        return self._shaped_as(nodes, placed, zeros, name, width)

    def add(self, nodes: TaggedNodes, stream: ir.Value, rows: ir.Value | None, kept: ir.Value) -> None:  # noqa: D102
        # Rows are replaced by their sums with the branch, because TensorRT's scatter does not add. The last Reshape
        # gives the stream its shape again and closes the block.
        block, name, hidden = self.masked.block, self.masked.path, self.masked.layer.hidden_size
        if rows is None:
            rows = self.gather(nodes, stream, hidden, f"{name}.stream_rows")
        dtype, shape = element_type(stream), (self.count, hidden)
        sums = nodes.add("Add", rows, kept, name=f"{name}.row_sums", dtype=dtype, shape=shape)
        flat = self._flat(nodes, stream, hidden, f"{name}.flat")
        merged = self._scattered(nodes, flat, sums, hidden, f"{name}.scattered")
        total = self._shaped_as(nodes, merged, stream, block.stream_out.name or f"{name}.merged", hidden, closes=0)
        self.close(nodes, total)

    def _flat(self, nodes: TaggedNodes, value: ir.Value, width: int | None, name: str) -> ir.Value:
        """[batch, sequence, width] as [tokens, width], [batch, sequence] as [tokens]."""
        if value in self._flats:
            return self._flats[value]
        sizes, shape = ([-1], ("tokens",)) if width is None else ([-1, width], ("tokens", width))
        to = self._constant("flat" if width is None else f"flat_{width}", sizes)
        self._flats[value] = nodes.add("Reshape", value, to, name=name, dtype=element_type(value), shape=shape)
        return self._flats[value]

    def _scattered(self, nodes: TaggedNodes, flat: ir.Value, rows: ir.Value, width: int, name: str) -> ir.Value:
        places = nodes.add(
            "Unsqueeze",
            self._index,
            self._constant("last_axis", [-1]),
            name=f"{name}_places",
            dtype=ir.DataType.INT64,
            shape=(self.count, 1),
        )
        return nodes.add("ScatterND", flat, places, rows, name=name, dtype=element_type(rows), shape=("tokens", width))

    def _shaped_as(
        self, nodes: TaggedNodes, flat: ir.Value, like: ir.Value, name: str, width: int, closes: int | None = None
    ) -> ir.Value:
        sizes = nodes.add("Shape", like, name=f"{name}.sizes", dtype=ir.DataType.INT64, shape=(3,))
        shape = (*self.masked.layer.token_dims, width)
        return nodes.add("Reshape", flat, sizes, name=name, dtype=element_type(flat), shape=shape, closes=closes)

    def _active_tokens(self) -> ir.Value:
        """Indices of the active tokens among all, int64 [count]."""
        # All tokens of the step in one row: to the MLP it does not matter which sequence one belongs to.
        flags = self._add("Reshape", self.masked.active, self._constant("flat", [-1]), name="flat_active")
        flags.type = ir.TensorType(ir.DataType.BOOL)
        flags = self._add("Cast", flags, name="flags", dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        if self._chunks == 1:
            return self._chosen(flags, "")
        # Chunks of constant size: behind the last token there are as many that are never active.
        size = self._chunks * MOST_SELECTED
        padding = shared_constant(self.graph, f"{ROUTERS}.padding_{size}", np.zeros(size, np.float32))
        padded = self._add("Concat", flags, padding, name="padded_flags", dtype=ir.DataType.FLOAT, axis=0)
        parts = []
        for number in range(self._chunks):
            start, end = number * MOST_SELECTED, (number + 1) * MOST_SELECTED
            part = self._add(
                "Slice",
                padded,
                self._constant(f"chunk_{start}", [start]),
                self._constant(f"chunk_{end}", [end]),
                name=f"flags_{number}",
                dtype=ir.DataType.FLOAT,
            )
            chosen = self._chosen(part, f"_{number}")
            # A TopK counts within its chunk.
            offset = self._constant(f"chunk_{start}", [start])
            parts.append(self._add("Add", chosen, offset, name=f"active_tokens_{number}", dtype=ir.DataType.INT64))
        return self._add("Concat", *parts, name="active_tokens", dtype=ir.DataType.INT64, axis=0)

    def _chosen(self, flags: ir.Value, suffix: str) -> ir.Value:
        """Indices of the ones among flags, int64."""
        float32, int64, router = ir.DataType.FLOAT, ir.DataType.INT64, self.router
        # How many there are, and how many TopK is asked for: at least one, since its K must be positive.
        total = self._add("ReduceSum", flags, name=f"total{suffix}", dtype=float32, keepdims=1)
        one = shared_constant(self.graph, f"{ROUTERS}.one", np.array([1], np.float32))
        positive = self._add("Max", total, one, name=f"positive{suffix}", dtype=float32)
        count = self._add("Cast", total, name=f"count{suffix}", dtype=int64, to=int(int64))
        k = self._add("Cast", positive, name=f"k{suffix}", dtype=int64, to=int(int64))
        for value in (total, positive, count, k):
            value.shape = ir.Shape((1,))

        # The largest flags are the ones; where there is none, the Slice behind drops what TopK chose all the same.
        top = ir.node(
            "TopK",
            [flags, k],
            {"axis": 0, "largest": 1, "sorted": 0},
            num_outputs=2,
            name=f"{router}.topk{suffix}",
            metadata_props=dict(self._index_nodes.tags),
        )
        for output, kind, dtype in zip(top.outputs, ("flags", "index"), (float32, int64), strict=True):
            output.name = f"{router}.topk_{kind}{suffix}"
            output.type = ir.TensorType(dtype)
            output.shape = ir.Shape((f"{self.count}{suffix}_or_one",))
        self._index_nodes.nodes.append(top)
        first = self._constant("chunk_0", [0])
        return self._add("Slice", top.outputs[1], first, count, name=f"chosen{suffix}", dtype=int64)

    def _add(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        return self._index_nodes.add(
            op_type, *inputs, name=f"{self.router}.{name}", dtype=dtype, shape=None, **attributes
        )

    def _constant(self, name: str, numbers: Sequence[int]) -> ir.Value:
        return shared_constant(self.graph, f"{ROUTERS}.{name}", np.array(numbers, np.int64))
