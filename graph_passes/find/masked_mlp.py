"""Recognise the masked canonical form of a routed MLP block, whoever wrote it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import constant_integers, constant_scalar, is_constant, is_op, rank
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedMlp:
    """A block `y = h + where(active, [scale ·] mlp(h), 0)`.

    Attributes:
        layer: The decoder layer.
        active: bool [batch, sequence].
        select: The Where node.
        kept: What it keeps where active: the branch, scaled if it is.
        scale: Per-token factor [batch, sequence], None when the branch is not scaled per token.
        scaling: The Mul that applies it.
        nodes: Nodes from h to `kept`, `scaling` included, topologically ordered.
    """

    layer: DecoderLayer
    active: ir.Value
    select: ir.Node
    kept: ir.Value
    scale: ir.Value | None
    scaling: ir.Node | None
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why a block is not in masked form.

    Attributes:
        reason: What was found instead, with its place.
        masked: Whether the block has a mask at all; if not, it is simply not routed.
    """

    reason: str
    masked: bool


def match_masked_mlp(layer: DecoderLayer) -> MaskedMlp | Mismatch:
    """Match the MLP block of a layer against the masked form.

    Returns:
        The parts, or the reason why not. The branch must read nothing but h, constants and the scale, and none of its
        values may be used elsewhere: else running it on some tokens only would change the graph's meaning.
    """
    if layer.mlp.conditional is not None:
        return Mismatch(
            f"layer {layer.index}: {place(layer.mlp.conditional)} skips its MLP branch already", masked=True
        )
    # From the addition backwards: the mask, its condition, what it keeps, and the scale in front of it.
    select = layer.mlp.branch.producer()
    if select is None or not is_op(select, "Where"):
        return Mismatch(f"layer {layer.index}: {place(layer.mlp.add)} adds the MLP branch unmasked", masked=False)
    column, kept, otherwise = select.inputs
    active = _column_source(column)
    if active is None or active.dtype != ir.DataType.BOOL or rank(active) != 2:
        return Mismatch(
            f"{_at(layer, select)}: its condition is not Unsqueeze(bool [batch, sequence], -1)", masked=True
        )
    if kept is None or constant_scalar(otherwise) != 0.0:
        return Mismatch(f"{_at(layer, select)}: it does not select zero for skipped tokens", masked=True)
    # The form fits; the rest asks whether the branch may be run on some tokens only.
    nodes = tuple(node for node in layer.mlp.nodes if node is not select)
    scale, scaling = _scale_of(kept, set(nodes))
    masked = MaskedMlp(layer, active, select, kept, scale, scaling, nodes)
    problem = _foreign_read(masked) or _foreign_use(masked)
    return masked if problem is None else Mismatch(problem, masked=True)


def _at(layer: DecoderLayer, node: ir.Node) -> str:
    return f"layer {layer.index}: {place(node)}"


def _column_source(value: ir.Value | None) -> ir.Value | None:
    """The [batch, sequence] value behind an Unsqueeze of the last axis."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Unsqueeze") or constant_integers(node.inputs[1]) not in {(-1,), (2,)}:
        return None
    return node.inputs[0]


def _scale_of(kept: ir.Value, nodes: set[ir.Node]) -> tuple[ir.Value | None, ir.Node | None]:
    # A scale per token is a column that does not come from the branch; a constant one is part of the branch.
    scaling = kept.producer()
    if scaling is not None and is_op(scaling, "Mul"):
        for operand in scaling.inputs:
            source = _column_source(operand)
            if source is not None and source.producer() not in nodes:
                return source, scaling
    return None, None


def _foreign_read(masked: MaskedMlp) -> str | None:
    inner = {masked.layer.mlp.stream_in, *(output for node in masked.nodes for output in node.outputs)}
    for node in masked.nodes:
        for value in node.inputs:
            if value is None or value in inner or is_constant(value):
                continue
            # The scale is the one value from elsewhere that may come in: a lowering gathers it along with the rows.
            if node is masked.scaling and _column_source(value) is masked.scale:
                continue
            return f"{_at(masked.layer, node)} of the MLP branch reads '{value.name}', not the stream after attention"
    return None


def _foreign_use(masked: MaskedMlp) -> str | None:
    # The addition may read two of the values: what is added, and the stream where a cast of it feeds the branch too.
    block = masked.layer.mlp
    inner = {*masked.nodes, masked.select}
    for node in (*masked.nodes, masked.select):
        for value in node.outputs:
            added = value is block.branch or value is block.stream_operand
            users = [user for user in value.consumers() if user not in inner and not (added and user is block.add)]
            if users or value.is_graph_output():
                user = place(users[0]) if users else "the graph's outputs"
                return f"{_at(masked.layer, node)} of the MLP branch is used elsewhere, by {user}"
    return None
