"""Run the projections of a masked attention on the rows of active tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import layer_tensor_name
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import constant_tensor, element_type, is_op
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.token_wise import token_wise_nodes
from dlo_export.graph_passes.lowerings.active_rows import run_on_rows, stream_for_all_tokens, token_zeros
from dlo_export.graph_passes.lowerings.compacted_rows import active_index, put_rows_back, row_count
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.spec.provenance import TaggedNodes

_KEY, _VALUE = 1, 2  # inputs of an Attention node


def row_problems(masked: MaskedAttention) -> list[str]:
    """Why the projections cannot run on rows; none if they can."""
    on_rows = token_wise_nodes(masked.projections, masked.layer.input)
    problems = [] if any(is_op(node, "MatMul") for node in on_rows) else ["none of its projections runs on rows"]
    if any(_width(value) is None or element_type(value) is None for value in _boundary(on_rows)):
        problems.append("the graph does not say how wide its projections are, or of which type")
    behind = token_wise_nodes(masked.outputs, masked.attention.outputs[0])
    if not masked.outputs:
        problems.append("nothing is projected behind its attention")
    problems += [f"{place(node)} does not run on rows" for node in masked.outputs if node not in behind]
    return problems


def run_on_active_rows(graph: ir.Graph, masked: MaskedAttention, made_by: str) -> None:
    """Gathers rows in front of the projections and behind attention, which itself stays [batch, sequence].

    Args:
        graph: Holds the layer; its nodes need sorting afterwards.
        masked: Without `row_problems`.
        made_by: Name of the pass.
    """
    block, attention, layer = masked.layer.attention, masked.attention, masked.layer
    name, count = layer_tensor_name(layer.index, "self_attn"), row_count(masked)
    on_rows = token_wise_nodes(masked.projections, block.stream_in)
    index = active_index(graph, masked, made_by, on_rows[0])
    boundary = _boundary(on_rows)

    # In front: the projections read rows. What is behind them (rotary embedding, attention) is for all tokens again,
    # zeros where a token skips: they are scattered into zeros that all layers share.
    gather, dtype = TaggedNodes(made_by, layer.index), element_type(block.stream_in)
    shape = (count, layer.hidden_size)
    rows = gather.add("GatherND", block.stream_in, index, name=f"{name}.rows", dtype=dtype, shape=shape)
    stream = stream_for_all_tokens(block, on_rows, gather)
    graph.insert_before(on_rows[0], gather.nodes)
    run_on_rows(on_rows, block.stream_in, rows, (count,))
    placed = [_for_all_tokens(graph, masked, value, on_rows, index, made_by) for value in boundary]

    # Rotated zeros are zeros, so keys and values need no Where any more; behind other nodes they keep it.
    for position, select in ((_KEY, masked.key_select), (_VALUE, masked.value_select)):
        computed = select.inputs[1]
        if computed is not None and _unrotated(computed) in placed:
            attention.replace_input_with(position, computed)
            remove_with_sources(graph, select)

    # Behind attention, rows once more, added to those of the stream.
    attended = attention.outputs[0]
    again, dtype = TaggedNodes(made_by, layer.index), element_type(attended)
    attended_rows = again.add("GatherND", attended, index, name=f"{name}.attended_rows", dtype=dtype, shape=None)
    graph.insert_before(masked.outputs[0], again.nodes)
    run_on_rows(masked.outputs, attended, attended_rows, (count,))
    put_rows_back(graph, masked, TaggedNodes(made_by, layer.index), stream, rows, index, masked.kept)


def _for_all_tokens(
    graph: ir.Graph,
    masked: MaskedAttention,
    rows: ir.Value,
    on_rows: Sequence[ir.Node],
    index: ir.Value,
    made_by: str,
) -> ir.Value:
    """Gives rows their places among all tokens, for whoever reads them and does not run on rows himself."""
    width, dtype, producer = _width(rows), element_type(rows), rows.producer()
    assert width is not None, "asked by row_problems"
    assert dtype is not None, "asked by row_problems"
    assert producer is not None, "one of those on rows"
    readers = [use for use in rows.uses() if use.node not in on_rows]
    zeros = token_zeros(graph, made_by, width, dtype, producer)
    new, shape = TaggedNodes(made_by, masked.layer.index), (*masked.layer.token_dims, width)
    placed = new.add("ScatterND", zeros, index, rows, name=f"{rows.name}.all_tokens", dtype=dtype, shape=shape)
    graph.insert_after(producer, new.nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, placed)
    return placed


def _boundary(on_rows: Sequence[ir.Node]) -> list[ir.Value]:
    """Values of nodes on rows that somebody reads who is not."""
    computed = [value for node in on_rows for value in node.outputs]
    return [value for value in computed if any(user not in on_rows for user in value.consumers())]


def _width(value: ir.Value) -> int | None:
    """Size of the last axis of a projection: as declared, or as its matrix or bias says."""
    if value.shape is not None and isinstance(last := value.shape[-1], int):
        return last
    node = value.producer()
    if node is None or not is_op(node, "MatMul", "Add"):
        return None
    tensors = [constant_tensor(operand) for operand in node.inputs]
    sizes = [int(tensor.shape[-1]) for tensor in tensors if tensor is not None and len(tensor.shape)]  # type: ignore[arg-type]  # tensors have no symbolic dimensions
    return max(sizes, default=None)


def _unrotated(value: ir.Value) -> ir.Value:
    """What rotary embedding was given: where that is zero, so is the value."""
    node = value.producer()
    while node is not None and is_op(node, "RotaryEmbedding") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value
