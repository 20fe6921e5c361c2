"""Move a masked attention, and what it appends to the cache, into a branch of an If."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS
from dlo_export.checkpoints.llama_layer import ROUTERS, layer_path
from dlo_export.graph_passes.branches import conditional_node
from dlo_export.graph_passes.find.data_flow import element_type, node_order
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_branch import own_columns
from dlo_export.graph_passes.lowerings.branch_addition import renew_addition
from dlo_export.graph_passes.lowerings.lowering_pass import cast_problems
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.lowerings.zeroed_projections import zero_in_front
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant, shared_node


def branch_problems(masked: MaskedAttention) -> list[str]:
    """Why the block cannot be moved: a cast between stream and sum, or a cache of unknown size."""
    problems = cast_problems(masked)
    if _cache_sizes(masked) is None:
        problems.append("the graph does not say how many heads its cache has, or how wide they are")
    return problems


def move_into_branch(
    graph: ir.Graph, masked: MaskedAttention, condition: ir.Value, made_by: str, behind: Sequence[ir.Node] = ()
) -> None:
    """Puts an If in place of the block, as it is, with an addition of its own that closes it.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        masked: Without `branch_problems`.
        condition: bool, 0-D: whether the block is computed.
        made_by: Name of the pass.
        behind: The layer's MLP, where the branch holds it too.
    """
    addition = renew_addition(graph, masked, made_by)
    nodes = zero_in_front(graph, masked, made_by)
    hides = None if masked.hidden is None else masked.hidden.mask_select
    columns = own_columns(nodes, (masked.select, masked.scaling, hides))
    order = node_order(graph)
    moved = sorted({*nodes, *columns}, key=order.__getitem__)
    close_in_branch(graph, masked, condition, made_by, [*moved, addition], behind)


def close_in_branch(
    graph: ir.Graph,
    masked: MaskedAttention,
    condition: ir.Value,
    made_by: str,
    nodes: Sequence[ir.Node],
    behind: Sequence[ir.Node] = (),
) -> None:
    """Puts an If in place of nodes: it computes them, or passes on the stream and appends to the cache what it must.

    That is zeros where skipped tokens leave no keys and values; those of the step where they do, which are computed
    in front of the If.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        masked: Without `branch_problems`.
        condition: bool, 0-D: whether they are computed.
        made_by: Name of the pass.
        nodes: All that serve active tokens only, whatever a lowering has made of them; the last one gives the stream
            behind the block.
        behind: Those of the layer's MLP, likewise, where the If is to hold the whole layer.
    """
    layer, nodes = masked.layer, [*nodes, *behind]
    name = layer_path(layer.index) if behind else masked.path
    dtype = element_type(layer.input)
    shape, tags = (*layer.token_dims, layer.hidden_size), TaggedNodes(made_by, layer.index).tags
    zeros = None if masked.hidden is None else _zero_rows(graph, masked, made_by, nodes[0])

    # What the If gives out takes the place of stream and cache first: the branch's own values get other names,
    # since names are unique across a graph and its branches.
    kept = (nodes[-1].outputs[0], layer.present_key, layer.present_value)
    results = [ir.Value(type=value.type, shape=None if value.shape is None else value.shape.copy()) for value in kept]
    results[0].type, results[0].shape = ir.TensorType(dtype), ir.Shape(shape)  # type: ignore[arg-type]  # known since routing
    for old, new in zip(kept, results, strict=True):
        replace_value(old, new)
    for value, part in zip(kept, ("output", *CACHE_PARTS), strict=True):
        value.name = f"{name}.active_{part}"

    # The other branch: the stream as it is, and what the step leaves in the cache.
    keep = TaggedNodes(made_by, layer.index)
    skipped = [keep.add("Identity", layer.input, name=f"{name}.skipped_output", dtype=dtype, shape=shape)]
    for number, (past, present, part) in enumerate(
        zip((layer.past_key, layer.past_value), kept[1:], CACHE_PARTS, strict=True), start=1
    ):
        left = _heads_first(graph, masked, keep, number, f"{name}.skipped_step_{part}") if zeros is None else zeros
        skipped.append(
            keep.add(
                "Concat",
                past,
                left,
                name=f"{name}.skipped_{part}",
                dtype=present.dtype,
                shape=present.shape,
                axis=2,
            )
        )
    graph.append(conditional_node(graph, name, condition, (nodes, kept), (keep.nodes, skipped), results, tags))


def _cache_sizes(masked: MaskedAttention) -> tuple[int, int] | None:
    """Number of key-value heads and their width."""
    shape = masked.layer.past_key.shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    return shape[1], shape[3]


def _heads_first(graph: ir.Graph, masked: MaskedAttention, nodes: TaggedNodes, number: int, name: str) -> ir.Value:
    """Keys or values of a step, the operand of attention of this number, as the cache has them."""
    assert masked.attention is not None, "only an Attention node is moved"
    computed, sizes = masked.attention.inputs[number], _cache_sizes(masked)
    assert computed is not None, "attention with a cache has keys and values"
    assert sizes is not None, "asked by branch_problems"
    (heads, width), (batch, sequence), dtype = sizes, masked.layer.token_dims, masked.layer.past_key.dtype
    shape = shared_constant(graph, f"model.heads_shape_{heads}x{width}", np.array([0, 0, heads, width], np.int64))
    apart = nodes.add(
        "Reshape", computed, shape, name=f"{name}_heads", dtype=dtype, shape=(batch, sequence, heads, width)
    )
    return nodes.add(
        "Transpose", apart, name=name, dtype=dtype, shape=(batch, heads, sequence, width), perm=(0, 2, 1, 3)
    )


def _zero_rows(graph: ir.Graph, masked: MaskedAttention, made_by: str, before: ir.Node) -> ir.Value:
    """Keys or values of a step whose tokens all skip, [batch, kv_heads, sequence, head_dim]: once for all layers."""
    sizes, dtype = _cache_sizes(masked), masked.layer.past_key.dtype
    assert sizes is not None, "asked by branch_problems"
    assert dtype is not None, "of a graph input"
    heads, width = sizes
    batch, sequence = masked.layer.token_dims
    zeros = token_zeros(graph, made_by, heads * width, dtype, before)
    shape = shared_constant(graph, f"{ROUTERS}.heads_{heads}x{width}", np.array([0, heads, -1, width], np.int64))
    return shared_node(
        graph,
        "Reshape",
        zeros,
        shape,
        name=f"{zeros.name}_{heads}x{width}",
        tags=TaggedNodes(made_by, None).tags,
        dtype=dtype,
        shape=(batch, heads, sequence, width),
        before=before,
    )
