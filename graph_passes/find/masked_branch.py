"""Recognise a block whose branch is masked per token: `stream + where(active, branch, 0)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import constant_integers, constant_scalar, is_op, producer_of, rank
from dlo_export.graph_passes.find.residual_stream import ResidualBlock


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Why a block is not in masked form.

    Attributes:
        reason: What was found instead, with its place.
        masked: Whether the block has a mask at all; if not, it is simply not routed.
    """

    reason: str
    masked: bool


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedBranch:
    """The mask of a block.

    Attributes:
        active: bool [batch, sequence].
        select: The Where node.
        kept: What it keeps where active.
    """

    active: ir.Value
    select: ir.Node
    kept: ir.Value

    def scaling(self, nodes: Collection[ir.Node]) -> tuple[ir.Value | None, ir.Node | None]:
        """The factor per token [batch, sequence] that the branch is multiplied by at its end, and the Mul that does it.

        Args:
            nodes: Of the branch. A factor for all tokens is part of it.
        """
        node = self.kept.producer()
        if is_op(node, "Mul"):
            for operand in node.inputs:
                source = column_source(operand)
                if source is not None and source.producer() not in nodes:
                    return source, node
        return None, None


def match_masked_branch(layer: int, block: ResidualBlock, what: str) -> MaskedBranch | Mismatch:
    """Match what a block adds to the stream.

    Args:
        layer: Its number, for messages.
        block: Of the layer.
        what: Its branch, for messages.
    """
    if block.conditional is not None:
        return Mismatch(f"layer {layer}: {place(block.conditional)} skips its {what} branch already", masked=True)
    # From the addition backwards: the mask, its condition, what it keeps.
    select = block.branch.producer()
    if not is_op(select, "Where"):
        return Mismatch(f"layer {layer}: {place(block.add)} adds the {what} branch unmasked", masked=False)
    column, kept, otherwise = select.inputs
    active = column_source(column)
    where = f"layer {layer}: {place(select)}"
    if active is None or active.dtype != ir.DataType.BOOL or rank(active) != 2:
        return Mismatch(f"{where}: its condition is not Unsqueeze(bool [batch, sequence], -1)", masked=True)
    if kept is None or constant_scalar(otherwise) != 0.0:
        return Mismatch(f"{where}: it does not select zero for skipped tokens", masked=True)
    return MaskedBranch(active, select, kept)


def column_source(value: ir.Value | None) -> ir.Value | None:
    """The [batch, sequence] value behind an Unsqueeze of the last axis."""
    node = producer_of(value)
    if not is_op(node, "Unsqueeze") or constant_integers(node.inputs[1]) not in {(-1,), (2,)}:
        return None
    return node.inputs[0]


def own_columns(readers: Collection[ir.Node], by_token: Iterable[ir.Node | None]) -> Iterator[ir.Node]:
    """The Unsqueeze nodes of decisions and scale, where they serve a branch only: their work can be skipped with it.

    One that another block reads too would no longer be computed in steps where this branch skips.

    Args:
        readers: All nodes that are skipped.
        by_token: Those of them that choose or scale token by token, None where there is no such.
    """
    for value in (value for node in by_token if node is not None for value in node.inputs):
        node = producer_of(value)
        if value is None or not is_op(node, "Unsqueeze") or node in readers:
            continue
        if set(readers).issuperset(value.consumers()) and not value.is_graph_output():
            yield node


def foreign_uses(
    nodes: Collection[ir.Node], block: ResidualBlock, shown: Collection[ir.Value] = ()
) -> Iterator[tuple[ir.Node, str]]:
    """Nodes of a block whose values are used outside of it, and by whom.

    Args:
        nodes: All of the block that a lowering moves or runs on some tokens only.
        block: Whose addition may read what it adds, and the stream where a cast of it feeds the branch too.
        shown: Values that may be outputs of the graph.
    """
    inner = set(nodes)
    for node in nodes:
        for value in node.outputs:
            added = value is block.branch or value is block.stream_operand
            users = [user for user in value.consumers() if user not in inner and not (added and user is block.add)]
            if users:
                yield node, place(users[0])
            elif value.is_graph_output() and value not in shown:
                yield node, "the graph's outputs"
