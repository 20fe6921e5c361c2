"""Mask a routed block's branch, and keep skipped tokens out of attention where they leave nothing there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import past_active_name, present_active_name
from dlo_export.checkpoints.llama_layer import ROUTERS, Block, layer_tensor_name, router_path
from dlo_export.graph_passes.cache.attention_cache import CachedAttention
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_KEY, _VALUE, _MASK = 1, 2, 3  # inputs of an Attention node
_COLUMNS: Mapping[Block, str] = {"self_attn": "attention_column", "mlp": "active_column"}


def attention_problems(layer: DecoderLayer, attentions: Mapping[int, CachedAttention]) -> Iterator[str]:
    """Why the attention of a layer cannot be switched.

    Args:
        layer: To be routed.
        attentions: Those of the graph, by layer.
    """
    attention = attentions.get(layer.index)
    if attention is None or attention.node not in layer.attention.nodes:
        yield f"layer {layer.index}: its attention block has no Attention node of its own"
        return
    mask = attention.operand(_MASK)
    if (dtype := element_type(mask)) != attention.dtype:
        found = "unknown type" if dtype is None else dtype.name.lower()
        yield (
            f"layer {layer.index}: the mask '{mask.name}' of {place(attention.node)} is {found}, expected an additive "
            f"one of {attention.dtype.name.lower()}"
        )
    if layer.attention.stream_operand is not layer.input:
        yield f"layer {layer.index}: {place(layer.attention.add)} adds to a cast of the stream"


def mask_branch(
    graph: ir.Graph,
    layer: DecoderLayer,
    block: Block,
    active: ir.Value,
    made_by: str,
    *,
    scale: ir.Value | None = None,
    column: ir.Value | None = None,
) -> None:
    """Adds zero where a token is not active. The addition stays what and where it is: it closes the block as before.

    Args:
        graph: Holds the layer.
        layer: To be routed.
        block: Whose branch is masked.
        active: bool [batch, sequence].
        made_by: Name of the pass.
        scale: What the branch is multiplied by: per token [batch, sequence], or one constant; None for 1.
        column: `active` as [batch, sequence, 1], where there is one already.
    """
    residual = layer.mlp if block == "mlp" else layer.attention
    add, branch = residual.add, residual.branch
    dtype, tokens = element_type(residual.stream_operand), layer.token_dims
    router, name = router_path(layer.index), layer_tensor_name(layer.index, block)
    assert dtype is not None, "checked before routing"
    mask, masked = TaggedNodes(made_by, layer.index), branch
    axis = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    if scale is not None and scale.producer() is not None:
        scale = mask.add("Unsqueeze", scale, axis, name=f"{router}.scale_column", dtype=dtype, shape=(*tokens, 1))
    if scale is not None:
        masked = mask.add("Mul", scale, masked, name=f"{name}.scaled", dtype=dtype, shape=branch.shape)
    if column is None:
        column = _add_column(graph, mask, layer, block, active)
    zero = router_constant(graph, "zero", 0.0, dtype)
    masked = mask.add("Where", column, masked, zero, name=f"{name}.masked", dtype=dtype, shape=branch.shape)
    graph.insert_before(add, mask.nodes)
    add.replace_input_with(list(add.inputs).index(branch), masked)


def router_constant(graph: ir.Graph, name: str, number: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """A number that all layers share; graphs may need it in two types."""
    suffix = "" if dtype == ir.DataType.FLOAT else f"_{dtype.name.lower()}"
    return shared_constant(graph, f"{ROUTERS}.{name}{suffix}", np.array(number, dtype.numpy()))


def hide_skipped_tokens(
    graph: ir.Graph, layer: DecoderLayer, attention: CachedAttention, active: ir.Value, made_by: str
) -> ir.Value:
    """Masks what one layer's attention sees, and gives the layer the state that says which cached tokens were active.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        layer: Without `attention_problems`.
        attention: Of the layer.
        active: bool [batch, sequence].
        made_by: Name of the pass.

    Returns:
        `active` as [batch, sequence, 1].
    """
    router, name, dtype, boolean = router_path(layer.index), attention.name, attention.dtype, ir.DataType.BOOL
    new = TaggedNodes(made_by, layer.index)
    heads_and_queries = shared_constant(graph, f"{ROUTERS}.heads_and_queries", np.array([1, 2], np.int64))
    zero = router_constant(graph, "zero", 0.0, dtype)
    lowest = router_constant(graph, "lowest", float(dtype.min), dtype)

    # The state grows with the cache: one flag per cached token, since nobody else knows whom this layer skipped.
    past, present = _state(layer)
    graph.inputs.append(past)
    now_active = new.add("Concat", past, active, name=present, dtype=boolean, shape=_total(layer), axis=1)
    graph.outputs.append(now_active)

    # Who is not active is hidden like padding, by the most negative finite number. Its keys and values are zeros: no
    # stale number, and no NaN, lies where a later step multiplies it by nothing.
    rows = new.add("Unsqueeze", now_active, heads_and_queries, name=f"{router}.active_keys", dtype=boolean, shape=None)
    bias = new.add("Where", rows, attention.operand(_MASK), lowest, name=f"{name}.bias", dtype=dtype, shape=None)
    column = _add_column(graph, new, layer, "self_attn", active)
    for index, part in ((_KEY, "keys"), (_VALUE, "values")):
        computed = attention.operand(index)
        kept = new.add("Where", column, computed, zero, name=f"{name}.active_{part}", dtype=dtype, shape=computed.shape)
        attention.node.replace_input_with(index, kept)
    attention.node.replace_input_with(_MASK, bias)
    graph.insert_before(attention.node, new.nodes)
    return column


def _add_column(graph: ir.Graph, nodes: TaggedNodes, layer: DecoderLayer, block: Block, active: ir.Value) -> ir.Value:
    axis = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    name, shape = f"{router_path(layer.index)}.{_COLUMNS[block]}", (*layer.token_dims, 1)
    return nodes.add("Unsqueeze", active, axis, name=name, dtype=ir.DataType.BOOL, shape=shape)


def _state(layer: DecoderLayer) -> tuple[ir.Value, str]:
    """The new graph input bool [batch, past], and the name of the output that continues it."""
    shape = layer.past_key.shape
    length = None if shape is None else shape[2]
    dims = (layer.token_dims[0], length)
    past = ir.Value(name=past_active_name(layer.index), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(dims))
    return past, present_active_name(layer.index)


def _total(layer: DecoderLayer) -> tuple[int | str | ir.SymbolicDim | None, ...]:
    shape = layer.present_key.shape
    return layer.token_dims[0], None if shape is None else shape[2]
