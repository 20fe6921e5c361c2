"""Move the projections around a masked attention into branches of two Ifs, where attention itself must stay outside."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from dlo_export.graph_passes.branches import Branch, conditional_node
from dlo_export.graph_passes.find.data_flow import element_type, node_order
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.projected_width import projected_width
from dlo_export.graph_passes.lowerings.mlp_in_branch import add_skip
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes


def projection_problems(masked: MaskedAttention) -> list[str]:
    """Why the projections cannot be moved: one of unknown width."""
    unknown = any(projected_width(value) is None or element_type(value) is None for value in _projected(masked))
    return ["the graph does not say how wide its projections are, or of which type"] if unknown else []


def move_projections_into_branches(graph: ir.Graph, masked: MaskedAttention, condition: ir.Value, made_by: str) -> None:
    """Puts an If in place of the projections in front of attention, and another in place of those behind it.

    TensorRT builds neither attention nor the update of a cache inside an If, and other operators than Attention write
    the cache for all tokens: both stay, and get zeros in steps that skip. One If gives query, key and value (the query
    alone, where skipped tokens leave their own keys and values; none, where it is one product with them), the other
    closes the block.

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        masked: Whose attention stays, without `projection_problems`.
        condition: bool, 0-D: whether they are computed.
        made_by: Name of the pass.
    """
    # Both see the order of the graph as it is now: nodes that move keep it.
    order = node_order(graph)
    if masked.projections:
        _move_front(graph, masked, condition, made_by, order)
    _move_back(graph, masked, condition, made_by, order)


def _move_front(
    graph: ir.Graph, masked: MaskedAttention, condition: ir.Value, made_by: str, order: Mapping[ir.Node, int]
) -> None:
    """What the projections give, or zeros. The If's outputs take the places and names of their values."""
    layer, skip = masked.layer, TaggedNodes(made_by, masked.layer.index)
    computed, results, zeros = _projected(masked), [], []
    for value in computed:
        width, dtype = projected_width(value), element_type(value)
        assert width is not None, "asked by projection_problems"
        assert dtype is not None, "asked by projection_problems"
        shape = (*layer.token_dims, width)
        result = ir.Value(type=ir.TensorType(dtype), shape=ir.Shape(shape))
        replace_value(value, result)
        value.name = f"{result.name}.active"
        shared = token_zeros(graph, made_by, width, dtype, masked.projections[0])
        zeros.append(skip.add("Identity", shared, name=f"{result.name}.skipped", dtype=dtype, shape=shape))
        results.append(result)
    projections = sorted(masked.projections, key=order.__getitem__)
    name = f"{masked.path}.projections"
    conditional = conditional_node(
        graph, name, condition, (projections, computed), (skip.nodes, zeros), results, skip.tags
    )
    graph.append(conditional)


def _move_back(
    graph: ir.Graph, masked: MaskedAttention, condition: ir.Value, made_by: str, order: Mapping[ir.Node, int]
) -> None:
    """The output projection and the sum that closes the block, or the stream as it is."""
    layer, block, name = masked.layer, masked.block, masked.path
    dtype, shape = element_type(block.stream_operand), (*layer.token_dims, layer.hidden_size)
    assert dtype is not None, "known since routing"
    result = ir.Value(type=ir.TensorType(dtype), shape=ir.Shape(shape))
    replace_value(block.stream_out, result)
    add, keep = TaggedNodes(made_by, layer.index), add_skip(masked, made_by)
    operands = [value for value in block.add.inputs if value is not None]
    closes = operands.index(block.branch)
    added = add.add("Add", *operands, name=f"{name}.active_output", dtype=dtype, shape=shape, closes=closes)
    behind = [*sorted({*masked.outputs, masked.select}, key=order.__getitem__), *add.nodes]
    branches: tuple[Branch, Branch] = (behind, [added]), (keep.nodes, [keep.nodes[-1].outputs[0]])
    conditional = conditional_node(graph, name, condition, *branches, [result], add.tags)
    graph.insert_before(block.add, conditional)
    graph.remove(block.add, safe=True)


def _projected(masked: MaskedAttention) -> list[ir.Value]:
    """What the projections compute: query, key and value; the query alone where the others serve all tokens."""
    selects = () if masked.hidden is None else (masked.hidden.key_select, masked.hidden.value_select)
    return [value for value in (masked.query, *(select.inputs[1] for select in selects)) if value is not None]
