"""Follow the residual stream of a decoder: x → x + branch(x) → …, by data flow alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir

from dlo_export.graph_passes.errors import DecoderLayersNotFound, place
from dlo_export.graph_passes.find.data_flow import (
    SHAPE_OPS,
    behind,
    constant_scalar,
    is_op,
    node_order,
    nodes_between,
    pass_through_values,
    subgraphs_of,
)
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.provenance import closed_branch
from dlo_export.graph_passes.weights.embedding import dequantized_rows, embedding_table

# Ops of com.microsoft that add to the stream and normalise it in one node: a branch cannot be cut out of them.
_FUSED_ADD_AND_NORM = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualBlock:
    """One step of the stream: `stream_out = stream_in + branch`.

    Attributes:
        stream_in: Residual stream before the block, [batch, sequence, hidden].
        nodes: Everything between `stream_in` and the node that closes the block, in topological order, that one
            excluded. Nodes that only share constants, masks or rotary tables with the block are not part of it.
        branch: What `add` joins with the stream: the value added, or what a lowering has made of it.
        add: The node that closes the block: an Add, or the node that a lowering has tagged.
        stream_out: Residual stream after the block.
        conditional: The node with subgraphs (an If) one of which holds `nodes` and `add`; None where the block stands
            in the main graph. `stream_out` is an output of it, or a value in that branch, where the next block stands
            there too.
    """

    stream_in: ir.Value
    nodes: tuple[ir.Node, ...]
    branch: ir.Value
    add: ir.Node
    stream_out: ir.Value
    conditional: ir.Node | None = None

    @property
    def stream_operand(self) -> ir.Value:
        """The input of `add` that carries the stream: `stream_in`, possibly behind Cast or Identity."""
        operands = (value for value in self.add.inputs if value is not None and value is not self.branch)
        return next(operands)

    @property
    def operand_nodes(self) -> tuple[ir.Node, ...]:
        """The Cast and Identity nodes between `stream_in` and `stream_operand`, in order."""
        found: list[ir.Node] = []
        value = self.stream_operand
        while value is not self.stream_in:
            node = value.producer()
            assert node is not None, "the operand is the stream behind Cast and Identity"
            assert node.inputs[0] is not None, "Cast and Identity have an input"
            found.insert(0, node)
            value = node.inputs[0]
        return tuple(found)


def embedding_values(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """Rows of a constant table, looked up by an integer graph input (input_ids): as numbers, or times one."""
    return tuple(
        _scaled(dequantized_rows(node) or node.outputs[0])
        for node in graph
        if len(node.inputs) > 1 and _is_integer_input(node.inputs[1]) and embedding_table(node) is not None
    )


def embedding_lookup(value: ir.Value) -> ir.Node:
    """The node that looks up one of `embedding_values`."""
    node = value.producer()
    while is_op(node, "Mul", "DequantizeLinear"):
        node = next(operand for operand in node.inputs if constant_scalar(operand) is None).producer()  # type: ignore[union-attr]  # a value
    assert node is not None, "the stream starts at an embedding node"
    return node


def _scaled(value: ir.Value) -> ir.Value:
    """The value times a constant number, where that is what reads it (Granite, Gemma); else the value itself."""
    readers = [node for node in value.consumers() if not is_op(node, *SHAPE_OPS)]
    if len(readers) != 1 or not is_op(readers[0], "Mul"):
        return value
    scaled = any(constant_scalar(operand) is not None for operand in readers[0].inputs)
    return readers[0].outputs[0] if scaled else value


def _is_integer_input(value: ir.Value | None) -> bool:
    source = behind(value, "Cast", "Identity")
    return source is not None and source.is_graph_input() and source.dtype in {ir.DataType.INT64, ir.DataType.INT32}


def residual_blocks(order: Mapping[ir.Node, int], root: ir.Value) -> tuple[ResidualBlock, ...]:
    """Every block of the stream that starts at `root`, in order.

    A block is closed by an addition to the stream, or by a node that a pass of this package has tagged as closing one;
    what a lowering puts in an addition's place is known to that lowering alone.

    Raises:
        DecoderLayersNotFound: Where the stream forks, or adds and normalises in one fused node.
    """
    walk = _Walk(order, root)
    blocks: list[ResidualBlock] = []
    stream = root
    while (block := walk.next_block(stream)) is not None:
        blocks.append(block)
        stream = block.stream_out
    return tuple(blocks)


class _Walk:
    """What following one stream needs to know of its graph."""

    def __init__(self, order: Mapping[ir.Node, int], root: ir.Value) -> None:
        self.order = order
        # What hangs off the embedding by its shape alone (lengths, masks) serves all layers and belongs to none.
        self.shared = {
            node for value in pass_through_values(root) for node in value.consumers() if is_op(node, *SHAPE_OPS)
        }
        # Nodes that close a routed block, in the order of execution; one in a branch of an If stands where the If does.
        self.holders = {subgraph: node for node in order for subgraph in subgraphs_of(node)}
        inner = (node for subgraph in self.holders for node in subgraph)
        tagged = [node for node in (*order, *inner) if closed_branch(node) is not None]
        self.tagged = sorted(tagged, key=self._position)
        # By conditional, the values that carry the stream into it.
        self.entering: dict[ir.Node, Collection[ir.Value]] = {}

    def _position(self, node: ir.Node) -> int:
        """Of the node, or of the one in whose subgraph it stands."""
        return self.order[node if node in self.order else self.holders[node.graph]]  # type: ignore[index]

    def next_block(self, stream: ir.Value) -> ResidualBlock | None:
        """The block that starts at `stream`; None at the end of the stream."""
        aliases = pass_through_values(stream)
        uses = [(node, index) for alias in aliases for node, index in alias.uses()]
        additions = {node: branch for node, index in uses if (branch := _added_branch(node, index)) is not None}
        found = [
            block
            for node, branch in additions.items()
            if branch not in aliases and (block := self._block(stream, node, branch)) is not None
        ]
        if not found:
            # No addition: then the next tagged node that depends on the stream closes its block. Additions come first,
            # because the tagged nodes of all later layers depend on this stream too.
            tagged = ((node, closed_branch(node)) for node in self.tagged)
            blocks = (self._block(stream, node, branch) for node, branch in tagged if branch is not None)
            found = list(itertools.islice((block for block in blocks if block is not None), 1))
            if any(not _joins_stream(block) for block in found):
                return None  # no stream, such as rotary tables, which all that attends depends on
            for block in found:  # those before it close blocks before it
                self.tagged = self.tagged[self.tagged.index(block.add) + 1 :]
        self._check_subgraphs(stream, [node for node, _ in uses], found, aliases)
        if len(found) > 1:
            adds = ", ".join(place(block.add) for block in found)
            raise DecoderLayersNotFound(
                f"find_decoder_layers: the residual stream forks at '{stream.name}': {adds} each add to it; "
                "expected one addition per block (attention, then MLP)."
            )
        return found[0] if found else None

    def _block(self, stream: ir.Value, closing: ir.Node, branch: ir.Value) -> ResidualBlock | None:
        """The block from `stream` to the node that closes it, None where its branch does not depend on the stream."""
        scope, conditional, output = self.order, None, closing.outputs[0]
        if closing not in self.order:
            # Its paths may run through the subgraph it stands in, whose output the holder passes on.
            subgraph = closing.graph
            assert isinstance(subgraph, ir.Graph), "a node that reads a value of a graph stands in one"
            conditional, ends = self.holders.get(subgraph), output in subgraph.outputs
            # A branch may hold several blocks: then only the last one's stream is given out, and all are tagged.
            if conditional is None or not (ends or closed_branch(closing) is not None):
                return None
            inner = {node: len(self.order) + number for node, number in node_order(subgraph).items()}
            scope = {**self.order, **inner}
            if ends:
                output = conditional.outputs[list(subgraph.outputs).index(output)]
        targets = [value for value in closing.inputs if value is not None]
        nodes = nodes_between(scope, (stream,), targets, self.shared)
        if branch.producer() not in nodes:
            return None
        return ResidualBlock(stream, nodes, branch, closing, output, conditional)

    def _check_subgraphs(
        self,
        stream: ir.Value,
        readers: Iterable[ir.Node],
        found: Iterable[ResidualBlock],
        aliases: Collection[ir.Value],
    ) -> None:
        """Subgraphs read the stream only where they are a block that is skipped: then it must pass on unchanged."""
        skipping = {block.conditional for block in found if self._passes_on(block, aliases)}
        # A conditional in the middle of a block, as around projections, is part of what the block computes.
        skipping |= {node for block in found for node in block.nodes if any(True for _ in subgraphs_of(node))}
        for node in readers:
            if node in self.order:
                continue
            holder = self.holders.get(node.graph) if isinstance(node.graph, ir.Graph) else None
            if holder is None or holder not in skipping:
                raise DecoderLayersNotFound(
                    f"find_decoder_layers: value '{stream.name}' of the residual stream is read inside a subgraph, "
                    f"by {place(node)}; expected only nodes of the main graph to read it, or an If that adds a branch "
                    "to it in one of its branches and passes it on in the other."
                )

    def _passes_on(self, block: ResidualBlock, aliases: Collection[ir.Value]) -> bool:
        """Whether what skips a block gives out the stream as it is when it does."""
        if block.conditional is None:
            return False
        entering = self.entering.setdefault(block.conditional, aliases)
        if block.stream_out not in block.conditional.outputs:
            return True  # the last block of the branch is asked
        others = [graph for graph in subgraphs_of(block.conditional) if graph is not block.add.graph]
        position = block.conditional.outputs.index(block.stream_out)
        return all(graph.outputs[position] in entering for graph in others)


def _joins_stream(block: ResidualBlock) -> bool:
    """Whether what closes a block joins its branch with the stream itself."""
    # A lowering may close a block by giving rows the stream's shape again, which it takes from the stream itself; and
    # between two blocks the stream may be rows of it, gathered in front of the first and put back behind the second.
    stream = pass_through_values(block.stream_in)
    taken = [node.outputs[0] for value in stream for node in value.consumers() if is_op(node, *SHAPE_OPS, "GatherND")]
    added = block.branch.producer()
    rows = added.inputs if is_op(added, "Add") else ()
    return not {*stream, *taken}.isdisjoint((*block.add.inputs, *rows))


def _added_branch(node: ir.Node, stream_index: int) -> ir.Value | None:
    """What a consumer of the stream adds to it, or None when it is not a residual addition."""
    if closed_branch(node) is not None:
        return None
    if is_op(node, "Add"):
        return node.inputs[1 - stream_index]
    if is_op(node, *_FUSED_ADD_AND_NORM, domain=MICROSOFT) and stream_index < 2:
        raise DecoderLayersNotFound(
            f"find_decoder_layers: {place(node)} adds to the residual stream and normalises it in one node; "
            "expected the addition as a node of its own.",
            hint="run SplitSkipNormsPass first, or export the graph without skip-norm fusion",
        )
    return None
