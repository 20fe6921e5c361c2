"""Recognise the masked canonical form of a routed attention block whose skipped tokens leave no keys and values."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import constant_integers, constant_scalar, is_op, nodes_between
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.masked_branch import (
    MaskedBranch,
    Mismatch,
    column_source,
    foreign_uses,
    match_masked_branch,
)

_KEY, _VALUE, _MASK = 1, 2, 3  # inputs of an Attention node


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedAttention:
    """A block `h = x + where(active, attention(x), 0)` in which active tokens attend among active tokens only.

    Attributes:
        layer: The decoder layer.
        active: bool [batch, sequence].
        select: The Where node of the branch.
        kept: What it keeps where active.
        attention: The Attention node (opset 23), which keeps its own cache.
        key_select: The Where node that writes zeros for the keys of skipped tokens; likewise `value_select`.
        mask_select: The Where node that hides skipped tokens, the cached ones too.
        projections: Nodes from x to query, key and value, in order.
        outputs: Nodes from what attention computes to `kept`, in order.
    """

    layer: DecoderLayer
    active: ir.Value
    select: ir.Node
    kept: ir.Value
    attention: ir.Node
    key_select: ir.Node
    value_select: ir.Node
    mask_select: ir.Node
    projections: tuple[ir.Node, ...]
    outputs: tuple[ir.Node, ...]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes that serve active tokens only, in order; the router and the state are not among them."""
        selects = (self.key_select, self.value_select, self.mask_select)
        return (*self.projections, *selects, self.attention, *self.outputs, self.select)


def match_masked_attention(layer: DecoderLayer) -> MaskedAttention | Mismatch:
    """Match the attention block of a layer against the masked form.

    Returns:
        The parts, or the reason why not. None of the block's values may be used elsewhere, the cache excepted.
    """
    block = layer.attention
    branch = match_masked_branch(layer.index, block, "attention")
    if isinstance(branch, Mismatch):
        return branch
    attentions = [node for node in block.nodes if is_op(node, "Attention")]
    if len(attentions) != 1:
        return Mismatch(f"layer {layer.index}: has {len(attentions)} Attention nodes, expected one", masked=True)
    (attention,) = attentions
    # Three things besides the branch keep skipped tokens out: no keys, no values, nobody looks at them.
    key, value = (_zeroed(attention.inputs[index], branch) for index in (_KEY, _VALUE))
    mask = _hidden(attention.inputs[_MASK], layer, branch)
    for part, found in (("keys", key), ("values", value), ("mask", mask)):
        if found is None:
            reason = f"layer {layer.index}: skipped tokens are not kept out of the {part} of {place(attention)}"
            return Mismatch(reason, masked=True)
    assert key is not None, "asked in the loop, as are the others"
    assert value is not None, "asked"
    assert mask is not None, "asked"
    order = {node: number for number, node in enumerate(block.nodes)}
    computed = [each for each in (attention.inputs[0], key.inputs[1], value.inputs[1]) if each is not None]
    masked = MaskedAttention(
        layer=layer,
        active=branch.active,
        select=branch.select,
        kept=branch.kept,
        attention=attention,
        key_select=key,
        value_select=value,
        mask_select=mask,
        projections=nodes_between(order, (layer.input,), computed),
        outputs=nodes_between(order, (attention.outputs[0],), (branch.kept,)),
    )
    cache = (layer.present_key, layer.present_value)
    for node, user in foreign_uses(masked.nodes, block, cache):
        reason = f"layer {layer.index}: {place(node)} of the attention branch is used elsewhere, by {user}"
        return Mismatch(reason, masked=True)
    return masked


def _zeroed(value: ir.Value | None, branch: MaskedBranch) -> ir.Node | None:
    """The Where node behind a value that is zero for skipped tokens."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "Where") or column_source(node.inputs[0]) is not branch.active:
        return None
    return node if constant_scalar(node.inputs[2]) == 0.0 else None


def _hidden(mask: ir.Value | None, layer: DecoderLayer, branch: MaskedBranch) -> ir.Node | None:
    """The Where node behind an additive mask that hides whoever is not active in `present_active`."""
    node = None if mask is None else mask.producer()
    if node is None or not is_op(node, "Where") or layer.present_active is None or node.outputs[0].dtype is None:
        return None
    state = layer.present_active.producer()
    if not is_op(state, "Concat") or list(state.inputs) != [layer.past_active, branch.active]:  # type: ignore[union-attr]  # is_op
        return None
    rows = None if node.inputs[0] is None else node.inputs[0].producer()
    if rows is None or not is_op(rows, "Unsqueeze") or rows.inputs[0] is not layer.present_active:
        return None
    lowest = constant_scalar(node.inputs[2]) == float(node.outputs[0].dtype.min)
    return node if lowest and constant_integers(rows.inputs[1]) == (1, 2) else None
