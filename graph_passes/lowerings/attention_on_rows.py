"""Run a masked attention's projections that serve active tokens only on their rows."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_branch import column_source
from dlo_export.graph_passes.find.projected_width import projected_width, unrotated
from dlo_export.graph_passes.find.token_wise import row_rank, token_wise_nodes
from dlo_export.graph_passes.lowerings.active_rows import RowAccess, run_on_rows, stream_for_all_tokens
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.weights.linear import linear_weight


def projections_on_rows(masked: MaskedAttention) -> tuple[ir.Node, ...]:
    """Those of its projections that compute each token by itself, in order."""
    return token_wise_nodes(masked.projections, masked.source)


def row_problems(masked: MaskedAttention) -> list[str]:
    """Why the projections cannot run on rows; none if they can."""
    on_rows = projections_on_rows(masked)
    # What attention computes is projected in any case; where the query is one product with keys and values, no more.
    runs = masked.attention is None or any(is_op(node, "MatMul") for node in on_rows)
    problems = [] if runs else ["none of its projections runs on rows"]
    widths = [_attended_width(masked), *map(projected_width, _boundary(on_rows))]
    if None in widths or any(element_type(value) is None for value in _boundary(on_rows)):
        problems.append("the graph does not say how wide its projections are, or of which type")
    columns = [] if masked.scaling is None else [value for value in masked.scaling.inputs if value is not None]
    scales = [column for column in columns if column_source(column) is masked.scale]
    behind = token_wise_nodes(masked.outputs, masked.attended, scales, most=3)
    if not masked.outputs:
        problems.append("nothing is projected behind its attention")
    problems += [f"{place(node)} does not run on rows" for node in masked.outputs if node not in behind]
    return problems


def run_on_active_rows(masked: MaskedAttention, access: RowAccess) -> None:
    """Gathers rows in front of the projections and behind attention, which itself stays [batch, sequence].

    Args:
        masked: Without `row_problems`.
        access: To its rows.
    """
    graph, block, layer = access.graph, masked.layer.attention, masked.layer
    name, on_rows = masked.path, projections_on_rows(masked)
    boundary = _boundary(on_rows)

    # In front: the projections read rows. What is behind them (rotary embedding, attention) is for all tokens again,
    # zeros where a token skips: they are scattered into zeros that all layers share.
    stream, rows, placed = block.stream_operand, None, list[ir.Value]()
    if on_rows:
        gather = access.new_nodes()
        rows = access.gather(gather, masked.source, layer.hidden_size, f"{name}.rows")
        stream = stream_for_all_tokens(block, on_rows, gather)
        graph.insert_before(on_rows[0], gather.nodes)
        run_on_rows(on_rows, masked.source, rows, (access.count,))
        placed = [_for_all_tokens(value, on_rows, access) for value in boundary]

    # Rotated zeros are zeros, so keys and values need no Where any more; behind other nodes they keep it.
    hidden = masked.hidden
    for select in () if hidden is None else (hidden.key_select, hidden.value_select):
        computed = select.inputs[1]
        if computed is not None and unrotated(computed) in placed:
            for use in tuple(select.outputs[0].uses()):
                use.node.replace_input_with(use.idx, computed)
            remove_with_sources(graph, select)

    # Behind attention, rows once more, added to the stream.
    again, width, rank = access.new_nodes(), _attended_width(masked), row_rank(masked.outputs)[0]
    attended_rows = access.gather(again, masked.attended, width, f"{name}.attended_rows")
    if rank == 3:
        attended_rows = access.as_batch(again, attended_rows, width, f"{name}.attended_rows_3d")
    access.scale(again)
    graph.insert_before(masked.outputs[0], again.nodes)
    run_on_rows(masked.outputs, masked.attended, attended_rows, (1, access.count) if rank == 3 else (access.count,))
    put_back, kept = access.new_nodes(), masked.kept
    if rank == 3:
        kept = access.from_batch(put_back, kept, layer.hidden_size, f"{name}.kept_rows", element_type(kept))
    access.add(put_back, stream, rows if masked.source is stream else None, kept)


def _for_all_tokens(rows: ir.Value, on_rows: Sequence[ir.Node], access: RowAccess) -> ir.Value:
    """Gives rows their places among all tokens, for whoever reads them and does not run on rows himself."""
    width, producer = projected_width(rows), rows.producer()
    assert width is not None, "asked by row_problems"
    assert producer is not None, "one of those on rows"
    readers = [use for use in rows.uses() if use.node not in on_rows]
    new = access.new_nodes()
    placed = access.spread(new, rows, width, f"{rows.name}.all_tokens", producer)
    access.graph.insert_after(producer, new.nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, placed)
    return placed


def _boundary(on_rows: Sequence[ir.Node]) -> list[ir.Value]:
    """Values of nodes on rows that somebody reads who is not."""
    computed = [value for node in on_rows for value in node.outputs]
    return [value for value in computed if any(user not in on_rows for user in value.consumers())]


def _attended_width(masked: MaskedAttention) -> int | None:
    """Size of the last axis of what attention computes: as the matrices say that read it."""
    matrices = map(linear_weight, masked.attended.consumers())
    return next((matrix.shape[1] for matrix in matrices if matrix is not None), None)
