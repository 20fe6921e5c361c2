"""Recognise the masked canonical form of a routed attention block: what it computes for active tokens only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import layer_tensor_name
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import (
    SHAPE_OPS,
    behind,
    constant_integers,
    constant_scalar,
    consumed_values,
    is_op,
    nodes_between,
    producer_of,
)
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.linear_flow import ATTENTION_OPS, LinearFlow, Part
from dlo_export.graph_passes.find.masked_branch import (
    MaskedBranch,
    Mismatch,
    column_source,
    foreign_uses,
    match_masked_branch,
)
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.provenance import SERVES_KEY

_QUERY, _KEY, _VALUE, _MASK = range(4)  # inputs of an Attention node


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenTokens:
    """What keeps skipped tokens out of an attention: they leave no keys, no values, and nobody looks at them.

    Attributes:
        key_select: The Where node that writes zeros for the keys of skipped tokens; likewise `value_select`.
        mask_select: The Where node that hides skipped tokens, the cached ones too.
    """

    key_select: ir.Node
    value_select: ir.Node
    mask_select: ir.Node

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All three."""
        return self.key_select, self.value_select, self.mask_select


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedAttention:
    """A block `h = x + where(active, [scale ·] attention(x), 0)`.

    Attributes:
        layer: The decoder layer.
        active: bool [batch, sequence].
        select: The Where node of the branch.
        kept: What it keeps where active: the branch, scaled if it is.
        scale: Per-token factor [batch, sequence], None when the branch is not scaled per token.
        scaling: The Mul that applies it.
        attention: The Attention node (opset 23), which keeps its own cache or attends to one of fixed size. None where
            attention is written in another way (ONNX Runtime's own operators, or spelled out), which serves all tokens.
        query: What attention is given of the query, [batch, sequence, heads·head_dim]; None where it has no projection
            of its own.
        attended: What attention computes, of the same shape.
        hidden: What keeps skipped tokens out; None where they leave keys and values like any token.
        source: What `projections` read, [batch, sequence, hidden]: x; or behind the norm, where keys and values of all
            tokens come from there too.
        projections: Nodes from `source` to what serves active tokens only: query, key and value; or the query alone,
            unless it is one product with keys and values.
        around: Nodes that only turn between the shapes of projections and attention, or write the cache of fixed size.
        outputs: Nodes from `attended` to `kept`, `scaling` included. All in order.
    """

    layer: DecoderLayer
    active: ir.Value
    select: ir.Node
    kept: ir.Value
    scale: ir.Value | None
    scaling: ir.Node | None
    attention: ir.Node | None
    query: ir.Value | None
    attended: ir.Value
    hidden: HiddenTokens | None
    source: ir.Value
    projections: tuple[ir.Node, ...]
    around: tuple[ir.Node, ...]
    outputs: tuple[ir.Node, ...]

    @property
    def block(self) -> ResidualBlock:
        """The residual block that is masked."""
        return self.layer.attention

    @property
    def path(self) -> str:
        """What its values are named after."""
        return layer_tensor_name(self.layer.index, "self_attn")

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes that serve active tokens only, in order; the router and the state are not among them."""
        hiding = () if self.hidden is None else self.hidden.nodes
        attention = () if self.attention is None else (self.attention,)
        return (*self.projections, *hiding, *self.around, *attention, *self.outputs, self.select)

    @property
    def stays(self) -> bool:
        """Whether attention itself runs in every step: in another form, or as its cache is written outside of it."""
        return self.attention is None or self.layer.present_key not in self.attention.outputs


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
    if not attentions and layer.past_active is None:
        return _match_around(layer, branch)
    if len(attentions) != 1:
        return Mismatch(f"layer {layer.index}: has {len(attentions)} Attention nodes, expected one", masked=True)
    (attention,) = attentions
    order = {node: number for number, node in enumerate(block.nodes)}
    hidden = None if layer.past_active is None else _match_hidden(layer, branch, attention)
    if isinstance(hidden, Mismatch):
        return hidden
    query, attended = _unturned(attention.inputs[_QUERY]), _turned_back(attention.outputs[0])
    assert query is not None, "Attention has a query"
    found = _projections(layer, attention, query, hidden, order)
    if isinstance(found, Mismatch):
        return found
    source, projections = found
    own = [query] if hidden is None else [query, hidden.key_select.outputs[0], hidden.value_select.outputs[0]]
    used = [*_present(attention.inputs[:_MASK]), *((layer.present_key, layer.present_value) if hidden else ())]
    turning = (*nodes_between(order, own, used), *nodes_between(order, (attention.outputs[0],), (attended,)))
    outputs = nodes_between(order, (attended,), (branch.kept,))
    scale, scaling = branch.scaling(outputs)
    masked = MaskedAttention(
        layer=layer,
        active=branch.active,
        select=branch.select,
        kept=branch.kept,
        scale=scale,
        scaling=scaling,
        attention=attention,
        query=query,
        attended=attended,
        hidden=hidden,
        source=source,
        projections=projections,
        around=tuple(node for node in turning if node is not attention),
        outputs=outputs,
    )
    return _own(masked)


def _match_around(layer: DecoderLayer, branch: MaskedBranch) -> MaskedAttention | Mismatch:
    """Match attention in whatever form: it runs for all tokens, and writes what they leave in the cache.

    Only what projects its query and what it computes serves active tokens alone, told apart by what flows where.
    """
    block, kept = layer.attention, branch.kept.producer()
    nodes = [node for node in block.nodes if node.metadata_props.get(SERVES_KEY) != "router"]
    order = {node: number for number, node in enumerate(block.nodes)}
    # What the branch is multiplied by is the router's.
    ends = kept.inputs if is_op(kept, "Mul") else (branch.kept,)
    try:
        flow = LinearFlow(nodes)
    except GraphPassError as error:
        return Mismatch(f"layer {layer.index}: {error.message}", masked=True)
    everybodys = flow.of(layer.present_key) | flow.of(layer.present_value)
    behind = flow.union(value for value in ends if column_source(value) is None)
    in_front = flow.first_without(everybodys)
    for what, parts in (("query", in_front), ("output", behind)):
        if len(parts) != 1 or (what == "output" and not all(map(_can_be_skipped, parts))):
            found = ", ".join(sorted(place(part.matrix.node) for part in parts)) or "no node"
            reason = f"layer {layer.index}: {found} projects the {what} of its attention, expected one MatMul"
            return Mismatch(reason, masked=True)
    (output,), (query,) = behind, in_front
    attended = _operand(output.matrix.node)
    # Columns of a matrix that keys or values come from, too, are computed for all tokens.
    front = query.matrix.node if _can_be_skipped(query) else None
    if front is None and query.whole:
        reason = f"layer {layer.index}: {place(query.matrix.node)} projects the query, expected a MatMul"
        return Mismatch(reason, masked=True)
    if front is not None and (problem := _query_read_elsewhere(layer, front, attended, order)) is not None:
        return Mismatch(problem, masked=True)
    outputs = nodes_between(order, (attended,), (branch.kept,))
    scale, scaling = branch.scaling(outputs)
    return _own(
        MaskedAttention(
            layer=layer,
            active=branch.active,
            select=branch.select,
            kept=branch.kept,
            scale=scale,
            scaling=scaling,
            attention=None,
            query=None if front is None else front.outputs[0],
            attended=attended,
            hidden=None,
            source=attended if front is None else _operand(front),
            projections=() if front is None else (front,),
            around=(),
            outputs=outputs,
        )
    )


def _query_read_elsewhere(
    layer: DecoderLayer, front: ir.Node, attended: ir.Value, order: Mapping[ir.Node, int]
) -> str | None:
    """Why queries of zeros would show: whatever else is computed from them. Their shape stays what it is."""
    query, cache = front.outputs[0], (layer.present_key, layer.present_value)
    # An operator that takes them apart computes what it caches from its own keys and values alone.
    operators = [node for node in layer.attention.nodes if (node.domain, node.op_type) in ATTENTION_OPS]
    stored = [value for node in operators for value in _present(node.inputs[_KEY:_MASK])] or cache
    if front in nodes_between(order, (layer.input,), stored):
        return f"layer {layer.index}: keys or values are computed from what {place(front)} computes"
    attending = nodes_between(order, (query,), (attended,))
    for node in (front, *attending):
        for value in node.outputs:
            others = (user for user in value.consumers() if user not in attending and not is_op(user, *SHAPE_OPS))
            if value is not attended and (user := next(others, None)) is not None:
                return f"layer {layer.index}: {place(node)} of its attention is used elsewhere, by {place(user)}"
            if value.is_graph_output() and value not in cache:
                return f"layer {layer.index}: {place(node)} of its attention is used elsewhere, by the graph's outputs"
    return None


def _own(masked: MaskedAttention) -> MaskedAttention | Mismatch:
    """The match, unless somebody outside of the block uses what serves active tokens only."""
    layer, nodes = masked.layer, masked.nodes if masked.attention is not None else (*masked.outputs, masked.select)
    for node, user in foreign_uses(nodes, layer.attention, (layer.present_key, layer.present_value)):
        reason = f"layer {layer.index}: {place(node)} of the attention branch is used elsewhere, by {user}"
        return Mismatch(reason, masked=True)
    return masked


def _can_be_skipped(part: Part) -> bool:
    """Whether a product computes nothing else, and takes tokens as they are."""
    node = part.matrix.node
    return part.whole and (is_op(node, "MatMul") or is_op(node, "MatMulNBits", domain=MICROSOFT))


def _operand(product: ir.Node) -> ir.Value:
    value = product.inputs[0]
    assert value is not None, "a product has two factors"
    return value


def _projections(
    layer: DecoderLayer,
    attention: ir.Node,
    query: ir.Value,
    hidden: HiddenTokens | None,
    order: Mapping[ir.Node, int],
) -> tuple[ir.Value, tuple[ir.Node, ...]] | Mismatch:
    """What projects for active tokens only, and what it reads."""
    if hidden is not None:
        computed = _present([query, hidden.key_select.inputs[1], hidden.value_select.inputs[1]])
        return layer.input, nodes_between(order, (layer.input,), computed)
    # Keys and values are everybody's, and so is what they share with the query: the norm.
    shared = nodes_between(order, (layer.input,), _present(attention.inputs[_KEY:_MASK]))
    own = tuple(node for node in nodes_between(order, (layer.input,), [query]) if node not in shared)
    everybodys = {layer.input, *(output for node in shared for output in node.outputs)}
    sources = {read for node in own for read in consumed_values(node) if read in everybodys}
    if len(sources) == 1:
        return sources.pop(), own
    read = ", ".join(sorted(f"'{each.name}'" for each in sources)) or "nothing of its own"
    return Mismatch(f"layer {layer.index}: the query of {place(attention)} is computed from {read}", masked=True)


def _present(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None]


def _match_hidden(layer: DecoderLayer, branch: MaskedBranch, attention: ir.Node) -> HiddenTokens | Mismatch:
    """The three things besides the branch that keep skipped tokens out."""
    key, value = (_zeroed(_step_part(attention.inputs[index]), branch) for index in (_KEY, _VALUE))
    mask = _hidden(attention.inputs[_MASK], layer, branch)
    for part, found in (("keys", key), ("values", value), ("mask", mask)):
        if found is None:
            reason = f"layer {layer.index}: skipped tokens are not kept out of the {part} of {place(attention)}"
            return Mismatch(reason, masked=True)
    assert key is not None, "asked in the loop, as are the others"
    assert value is not None, "asked"
    assert mask is not None, "asked"
    return HiddenTokens(key, value, mask)


def _zeroed(value: ir.Value | None, branch: MaskedBranch) -> ir.Node | None:
    """The Where node behind a value that is zero for skipped tokens."""
    node = producer_of(value)
    if not is_op(node, "Where") or column_source(node.inputs[0]) is not branch.active:
        return None
    return node if constant_scalar(node.inputs[2]) == 0.0 else None


def _hidden(mask: ir.Value | None, layer: DecoderLayer, branch: MaskedBranch) -> ir.Node | None:
    """The Where node behind an additive mask that hides whoever is not active in `present_active`."""
    node = producer_of(mask)
    if not is_op(node, "Where") or layer.present_active is None or node.outputs[0].dtype is None:
        return None
    state = layer.present_active.producer()
    if not is_op(state, "Concat", "TensorScatter") or state.inputs[0] is not layer.past_active:
        return None
    grows = is_op(state, "Concat")
    active = state.inputs[1] if grows else behind(state.inputs[1], "Unsqueeze", "Cast")
    if active is not branch.active or constant_scalar(node.inputs[2]) != float(node.outputs[0].dtype.min):
        return None
    return node if _is_row(node.inputs[0], layer.present_active, grows=grows) else None


def _is_row(value: ir.Value | None, state: ir.Value, *, grows: bool) -> bool:
    """Whether a value is the state as bool [batch, 1, 1, total]."""
    node = producer_of(value)
    if node is None:
        return False
    if grows:
        return is_op(node, "Unsqueeze") and node.inputs[0] is state and constant_integers(node.inputs[1]) == (1, 2)
    positive = is_op(node, "Greater") and constant_scalar(node.inputs[1]) == 0.0
    across = node.inputs[0].producer() if positive and node.inputs[0] is not None else None
    if not is_op(across, "Transpose") or across.inputs[0] is not state:
        return False
    return tuple(across.attributes.get_ints("perm") or ()) == (0, 1, 3, 2)


def _step_part(value: ir.Value | None) -> ir.Value | None:
    """A step's keys or values [batch, sequence, heads·head_dim] behind what attention is given."""
    node = producer_of(value)
    return _unturned(node.inputs[1] if is_op(node, "TensorScatter") else value)


def _unturned(value: ir.Value | None) -> ir.Value | None:
    """What stands with heads in front as it is without: behind Transpose and Reshape."""
    return behind(value, "Transpose", "Reshape")


def _turned_back(value: ir.Value) -> ir.Value:
    """What attention gives with heads in front, as it is without: in front of Transpose and Reshape."""
    while len(users := value.consumers()) == 1 and is_op(users[0], "Transpose", "Reshape"):
        value = users[0].outputs[0]
    return value
