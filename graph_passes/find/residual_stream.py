"""Follow the residual stream of a decoder: x → x + branch(x) → …, by data flow alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import onnx_ir as ir

from dlo_export.graph_passes.errors import DecoderLayersNotFound, place
from dlo_export.graph_passes.find.data_flow import (
    SHAPE_OPS,
    constant_tensor,
    is_op,
    node_order,
    nodes_between,
    pass_through_values,
    subgraphs_of,
)
from dlo_export.graph_passes.spec.ops import DOMAIN, SKIP_DOWN

# Ops of com.microsoft that add to the stream and normalise it in one node: a branch cannot be cut out of them.
_FUSED_ADD_AND_NORM = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualBlock:
    """One step of the stream: `stream_out = stream_in + branch`.

    Attributes:
        stream_in: Residual stream before the block, [batch, sequence, hidden].
        nodes: Everything between `stream_in` and the addition, in topological order, the addition excluded. Nodes that
            only share constants, masks or rotary tables with the block are not part of it.
        branch: The value added (of a compacted block, the rows added: [active tokens, hidden]).
        add: The node that adds: Add, ScatterND with reduction "add", a plugin; or, where rows of the flattened stream
            are replaced by sums, the Reshape that ends it.
        stream_out: Residual stream after the block.
        conditional: The If node whose then_branch holds `nodes` and `add`, and whose output `stream_out` is; None
            where the block stands in the main graph.
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


def embedding_values(graph: ir.Graph) -> tuple[ir.Value, ...]:
    """Outputs of the nodes that look up rows of a constant table by an integer graph input (input_ids)."""
    return tuple(
        node.outputs[0]
        for node in graph
        if is_op(node, "Gather") and _is_table(node.inputs[0]) and _is_integer_input(node.inputs[1])
    )


def _is_table(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and len(tensor.shape) == 2


def _is_integer_input(value: ir.Value | None) -> bool:
    while value is not None:
        if value.is_graph_input():
            return value.dtype in {ir.DataType.INT64, ir.DataType.INT32}
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and is_op(producer, "Cast", "Identity") else None
    return False


def residual_blocks(order: Mapping[ir.Node, int], root: ir.Value) -> tuple[ResidualBlock, ...]:
    """Every block of the stream that starts at `root`, in order.

    Raises:
        DecoderLayersNotFound: Where the stream forks, or adds and normalises in one fused node.
    """
    # What hangs off the embedding by its shape alone (lengths, masks) serves all layers and belongs to none.
    shared = {node for value in pass_through_values(root) for node in value.consumers() if is_op(node, *SHAPE_OPS)}
    branches = {branch: node for node in order if is_op(node, "If") for branch in subgraphs_of(node)}
    blocks: list[ResidualBlock] = []
    stream = root
    while (block := _next_block(order, branches, stream, shared)) is not None:
        blocks.append(block)
        stream = block.stream_out
    return tuple(blocks)


def _next_block(
    order: Mapping[ir.Node, int],
    branches: Mapping[ir.Graph, ir.Node],
    stream: ir.Value,
    excluded: Collection[ir.Node],
) -> ResidualBlock | None:
    aliases = pass_through_values(stream)
    found: list[ResidualBlock] = []
    inner_readers: dict[ir.Node, ir.Node | None] = {}
    for alias in aliases:
        for node, index in alias.uses():
            scope, conditional = order, None  # where the paths of a branch may run
            if node not in order:
                assert isinstance(node.graph, ir.Graph), "a node that reads a value of a graph stands in one"
                inner = ((inner, len(order) + number) for inner, number in node_order(node.graph).items())
                scope, conditional = {**order, **dict(inner)}, branches.get(node.graph)
                inner_readers[node] = conditional
            add, branch = _replaced_rows(node) or (node, _added_branch(node, index))
            if branch is None or branch in aliases:
                continue
            nodes = nodes_between(scope, (stream,), (branch, alias), excluded)
            if branch.producer() in nodes:
                output = add.outputs[0] if conditional is None else conditional.outputs[0]
                found.append(ResidualBlock(stream, nodes, branch, add, output, conditional))
    for node, conditional in inner_readers.items():
        if conditional is None or not any(_adds_or_passes(conditional, block, aliases) for block in found):
            raise DecoderLayersNotFound(
                f"find_decoder_layers: value '{stream.name}' of the residual stream is read inside a subgraph, "
                f"by {place(node)}; expected only nodes of the main graph to read it, or an If that adds a branch to "
                "it in its then_branch and passes it on in its else_branch."
            )
    if len(found) > 1:
        adds = ", ".join(place(block.add) for block in found)
        raise DecoderLayersNotFound(
            f"find_decoder_layers: the residual stream forks at '{stream.name}': {adds} each add to it; "
            "expected one addition per block (attention, then MLP)."
        )
    return found[0] if found else None


def _adds_or_passes(conditional: ir.Node, block: ResidualBlock, aliases: Collection[ir.Value]) -> bool:
    """Whether an If is the one around a block: what it adds to the stream when it runs, it leaves out otherwise."""
    then_branch, else_branch = (conditional.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    return (
        block.conditional is conditional
        and list(then_branch.outputs) == [block.add.outputs[0]]
        and len(else_branch.outputs) == 1
        and else_branch.outputs[0] in aliases
    )


def _replaced_rows(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Where rows of the flattened stream are replaced by their sums with a branch: the last node, and the branch.

    The form LowerSkipToTopKPass writes: Reshape(ScatterND(flat, places, Add(Gather(flat, …), branch)), …).
    """
    if not is_op(node, "Reshape"):
        return None
    flat = node.outputs[0]
    for scatter in flat.consumers():
        if not is_op(scatter, "ScatterND") or scatter.inputs[0] is not flat or "reduction" in scatter.attributes:
            continue
        total = None if scatter.inputs[2] is None else scatter.inputs[2].producer()
        if total is None or not is_op(total, "Add"):
            continue
        for rows, branch in (total.inputs, tuple(reversed(total.inputs))):
            gather = None if rows is None else rows.producer()
            back = scatter.outputs[0].consumers()
            if gather is None or not is_op(gather, "Gather") or gather.inputs[0] is not flat or branch is None:
                continue
            if len(back) == 1 and is_op(back[0], "Reshape"):
                return back[0], branch
    return None


def _added_branch(node: ir.Node, stream_index: int) -> ir.Value | None:
    """What a consumer of the stream adds to it, or None when it is not a residual addition."""
    if is_op(node, "Add"):
        return node.inputs[1 - stream_index]
    if is_op(node, "ScatterND") and stream_index == 0:
        reduction = node.attributes.get("reduction")
        return node.inputs[2] if reduction is not None and reduction.as_string() == "add" else None
    if is_op(node, SKIP_DOWN.name, domain=DOMAIN):
        return node.inputs[0] if SKIP_DOWN.inputs[stream_index].name == "residual" else None
    if is_op(node, *_FUSED_ADD_AND_NORM, domain="com.microsoft") and stream_index < 2:
        raise DecoderLayersNotFound(
            f"find_decoder_layers: {place(node)} adds to the residual stream and normalises it in one node; "
            "expected the addition as a node of its own.",
            hint="run SplitSkipNormsPass first, or export the graph without skip-norm fusion",
        )
    return None
