"""Mask the attention of a routed layer: active tokens attend among active tokens only, skipped ones leave nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import past_active_name, present_active_name
from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.cache.attention_cache import CachedAttention
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_KEY, _VALUE, _MASK = 1, 2, 3  # inputs of an Attention node


def attention_problems(layer: DecoderLayer, attentions: Mapping[int, CachedAttention]) -> Iterator[str]:
    """Why the attention of a layer cannot be masked.

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


def mask_attention(
    graph: ir.Graph, layer: DecoderLayer, attention: CachedAttention, active: ir.Value, made_by: str
) -> None:
    """Masks one layer's attention, and gives the layer the state that says which cached tokens were active.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        layer: Without `attention_problems`.
        attention: Of the layer.
        active: bool [batch, sequence].
        made_by: Name of the pass.
    """
    router, name, dtype, boolean = router_path(layer.index), attention.name, attention.dtype, ir.DataType.BOOL
    new = TaggedNodes(made_by, layer.index)
    last_axis = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    heads_and_queries = shared_constant(graph, f"{ROUTERS}.heads_and_queries", np.array([1, 2], np.int64))
    zero = shared_constant(graph, _typed("zero", dtype), np.zeros((), dtype.numpy()))
    lowest = shared_constant(graph, _typed("lowest", dtype), np.asarray(dtype.min, dtype.numpy()))

    # The state grows with the cache: one flag per cached token, since nobody else knows whom this layer skipped.
    past, present = _state(layer)
    graph.inputs.append(past)
    now_active = new.add("Concat", past, active, name=present, dtype=boolean, shape=_total(layer), axis=1)
    graph.outputs.append(now_active)

    # Who is not active is hidden like padding, by the most negative finite number. Its keys and values are zeros: no
    # stale number, and no NaN, lies where a later step multiplies it by nothing.
    rows = new.add("Unsqueeze", now_active, heads_and_queries, name=f"{router}.active_keys", dtype=boolean, shape=None)
    bias = new.add("Where", rows, attention.operand(_MASK), lowest, name=f"{name}.bias", dtype=dtype, shape=None)
    column_shape = (*layer.token_dims, 1)
    column = new.add(
        "Unsqueeze", active, last_axis, name=f"{router}.attention_column", dtype=boolean, shape=column_shape
    )
    for index, part in ((_KEY, "keys"), (_VALUE, "values")):
        computed = attention.operand(index)
        kept = new.add("Where", column, computed, zero, name=f"{name}.active_{part}", dtype=dtype, shape=computed.shape)
        attention.node.replace_input_with(index, kept)
    attention.node.replace_input_with(_MASK, bias)
    graph.insert_before(attention.node, new.nodes)

    # Behind attention, as behind an MLP: what is added is zero where the token is not active.
    add, branch = layer.attention.add, layer.attention.branch
    stream = element_type(branch) or dtype
    none = shared_constant(graph, _typed("zero", stream), np.zeros((), stream.numpy()))
    keep = TaggedNodes(made_by, layer.index)
    masked = keep.add("Where", column, branch, none, name=f"{name}.masked", dtype=stream, shape=branch.shape)
    graph.insert_before(add, keep.nodes)
    add.replace_input_with(list(add.inputs).index(branch), masked)


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


def _typed(name: str, dtype: ir.DataType) -> str:
    """Name of a constant: layers share it, graphs may need it in two types."""
    suffix = "" if dtype == ir.DataType.FLOAT else f"_{dtype.name.lower()}"
    return f"{ROUTERS}.{name}{suffix}"
