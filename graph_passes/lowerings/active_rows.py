"""What every lowering that runs a block on gathered rows shares."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant


class RowAccess(abc.ABC):
    """A layer's active tokens as rows, and the way back: how, is the lowering's own.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        masked: A block of it.
        made_by: Name of the pass.
    """

    def __init__(self, graph: ir.Graph, masked: MaskedBlock, made_by: str) -> None:
        self.graph, self.masked, self.made_by = graph, masked, made_by
        self._made: list[TaggedNodes] = []

    @property
    def nodes(self) -> list[ir.Node]:
        """Those made for this block alone, and not removed since; the last one closes it once rows were added."""
        return [node for made in self._made for node in made.nodes if node.graph is not None]

    @property
    def count(self) -> str:
        """Name of the number of active tokens, of a layer whatever of it is routed."""
        return f"active_tokens_{self.masked.layer.index}"

    def new_nodes(self) -> TaggedNodes:
        """An empty list of nodes of this block."""
        self._made.append(TaggedNodes(self.made_by, self.masked.layer.index))
        return self._made[-1]

    def as_batch(self, nodes: TaggedNodes, rows: ir.Value, width: int | None, name: str) -> ir.Value:
        """Rows [count, width] as a batch of one, for nodes that count their axes from the front."""
        shape = (1, self.count, width)
        return nodes.add("Unsqueeze", rows, self._first_axis, name=name, dtype=element_type(rows), shape=shape)

    def from_batch(
        self, nodes: TaggedNodes, batch: ir.Value, width: int, name: str, dtype: ir.DataType | None
    ) -> ir.Value:
        """Rows [count, width] of a batch of one, which need not say its type."""
        return nodes.add("Squeeze", batch, self._first_axis, name=name, dtype=dtype, shape=(self.count, width))

    @property
    def _first_axis(self) -> ir.Value:
        return shared_constant(self.graph, f"{ROUTERS}.first_axis", np.array([0], np.int64))

    @abc.abstractmethod
    def gather(self, nodes: TaggedNodes, value: ir.Value, width: int | None, name: str) -> ir.Value:
        """Active tokens' rows [count, width] of [batch, sequence, width]; [count] of [batch, sequence], width None."""

    @abc.abstractmethod
    def spread(self, nodes: TaggedNodes, rows: ir.Value, width: int, name: str, before: ir.Node) -> ir.Value:
        """Rows in their places among zeros, [batch, sequence, width]; what layers share is put in front of a node."""

    @abc.abstractmethod
    def add(self, nodes: TaggedNodes, stream: ir.Value, rows: ir.Value | None, kept: ir.Value) -> None:
        """Adds rows to the stream in place of the block's addition, which is gone with what served only it.

        Args:
            nodes: Those that lead to `kept`; the one that closes the block comes behind them.
            stream: For all tokens.
            rows: Of the stream, where they were gathered before.
            kept: What is added to them, [count, hidden].
        """

    def scale(self, nodes: TaggedNodes) -> None:
        """Multiplies the branch, which reads rows now, by their own tokens' scale, where it is scaled per token."""
        if self.masked.scale is not None and self.masked.scaling is not None:
            scale = self.gather(nodes, self.masked.scale, None, f"{router_path(self.masked.layer.index)}.scale_rows")
            scale_rows(self.graph, self.masked, nodes, scale, self.count)

    def close(self, nodes: TaggedNodes, total: ir.Value) -> None:
        """Puts `total`, the last of the nodes, in place of the block's addition."""
        block = self.masked.block
        self.graph.insert_before(block.add, nodes.nodes)
        replace_value(block.stream_out, total)
        remove_with_sources(self.graph, block.add)


def stream_for_all_tokens(block: ResidualBlock, nodes: Collection[ir.Node], new: TaggedNodes) -> ir.Value:
    """The stream operand of a block's addition, for all tokens.

    Casts between the stream and the addition that also feed the branch are about to run on rows: they get a copy.

    Args:
        block: To run on rows.
        nodes: Of the branch.
        new: Takes the copies.
    """
    # Casts that the branch does not read stay as they are: for all tokens.
    if not set(block.operand_nodes) & set(nodes):
        return block.stream_operand
    value = block.stream_in
    for node in block.operand_nodes:
        source = node.outputs[0]
        to: dict[str, Any] = {"to": node.attributes["to"].as_int()} if is_op(node, "Cast") else {}
        name = f"{source.name}.all_tokens"
        value = new.add(node.op_type, value, name=name, dtype=element_type(source), shape=source.shape, **to)
    return value


def scale_rows(graph: ir.Graph, masked: MaskedBlock, new: TaggedNodes, scale: ir.Value, count: str) -> None:
    """Multiply rows by the scale of their own token.

    Args:
        graph: Of the layer.
        masked: A block whose branch is scaled per token.
        new: Takes the new nodes.
        scale: Of the rows, [count].
        count: Name of the number of rows.
    """
    assert masked.scaling is not None, "called for scaled branches"
    router, dtype = router_path(masked.layer.index), element_type(scale)
    axis = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    # The factor of all tokens is replaced by the rows' own; what computed its column goes, if it served only here.
    column = new.add("Unsqueeze", scale, axis, name=f"{router}.scale_row_column", dtype=dtype, shape=(count, 1))
    position = 1 if masked.scaling.inputs[0] in {output for node in masked.nodes for output in node.outputs} else 0
    old = masked.scaling.inputs[position]
    masked.scaling.replace_input_with(position, column)
    if old is not None and not old.uses() and (producer := old.producer()) is not None:
        remove_with_sources(graph, producer)


def run_on_rows(nodes: Sequence[ir.Node], stream: ir.Value, rows: ir.Value, leading: tuple[int | str, ...]) -> None:
    """Makes the branch's nodes read rows [*leading, hidden] instead of the stream [batch, sequence, hidden]."""
    # Declared shapes change with it: a wrong one is worse than none, since runtimes check them.
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is stream:
                node.replace_input_with(position, rows)
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape((*leading, output.shape[2]))
