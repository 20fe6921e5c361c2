"""Norms around a block that runs on gathered rows: moved to where they fuse with the additions of the stream."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.skip_norms import is_norm, is_residual_addition, only_norm_of
from dlo_export.graph_passes.find.data_flow import constant_tensor, element_type, is_op, producer_of
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.provenance import PASS_KEY, closed_branch


def move_norms_off_rows(closing: ir.Node, tags: Mapping[str, str]) -> None:
    """Has a compacted block normalise, and be added, for all tokens, so that either is one operator with its neighbour.

    Before (n of the tokens are active)::

        h = Add(x, a)
        r = GatherND(h, idx)                          # [n, hidden]
        d = MLP(Norm(r, w))
        y = ScatterND(h, idx, Add(r, d))              # or the ScatterND adds d itself
        m = Norm(y, v)

    After::

        h = Add(x, a)
        d = MLP(GatherND(Norm(h, w), idx))
        y = Add(h, ScatterND(zeros, idx, d))          # zeros [batch, sequence, hidden], one node for all layers
        m = Norm(y, v)

    Each row is normalised by itself, so both give the same numbers, and each half happens where it serves: the first
    where no other norm reads h, the second where one norm reads y.

    Args:
        closing: A node of the main graph; left alone unless it is such a ScatterND of a lowering.
        tags: Metadata of new nodes.
    """
    if not is_op(closing, "ScatterND") or closed_branch(closing) is None:
        return
    stream, index, _ = closing.inputs
    assert stream is not None, "ScatterND has three inputs"
    assert index is not None, "ScatterND has three inputs"
    # The norm reads the stream as the addition does, or in front of casts that the addition alone wants.
    for gather in [node for node in index.consumers() if is_op(node, "GatherND")]:
        _gather_behind_norm(gather, tags)
    _add_behind_scatter(closing, stream, index, tags)


def _gather_behind_norm(gather: ir.Node, tags: Mapping[str, str]) -> None:
    graph, stream, rows = gather.graph, gather.inputs[0], gather.outputs[0]
    if graph is None or stream is None or not is_residual_addition(stream.producer()):
        return
    # A block that counts its axes from the front has rows as a batch of one.
    batches = [node for node in rows.consumers() if is_op(node, "Unsqueeze")]
    norms = [
        node for value in (rows, *(node.outputs[0] for node in batches)) for node in value.consumers() if is_norm(node)
    ]
    if len(norms) != 1 or constant_tensor(norms[0].inputs[1]) is None or any(map(is_norm, stream.consumers())):
        return
    (norm,) = norms
    whole = _like(norm, [stream, norm.inputs[1]], stream, f"{norm.name}.stream", tags)
    own = _like(gather, [whole.outputs[0], gather.inputs[1]], rows, f"{norm.name}.rows", gather.metadata_props)
    graph.insert_before(gather, [whole, own])
    last = own
    if norm.inputs[0] is not rows:
        (batch,) = batches
        like = batch.outputs[0]
        last = _like(batch, [own.outputs[0], batch.inputs[1]], like, f"{norm.name}.batch", batch.metadata_props)
        graph.insert_before(norm, last)
    replace_value(norm.outputs[0], last.outputs[0])
    remove_with_sources(_main(graph), norm)


def _add_behind_scatter(closing: ir.Node, stream: ir.Value, index: ir.Value, tags: Mapping[str, str]) -> None:
    graph, total = closing.graph, closing.outputs[0]
    norm, kept = only_norm_of(total, graph), _added_rows(closing, stream, index)
    if graph is None or norm is None or kept is None:
        return
    weight, dtype = constant_tensor(norm.inputs[1]), element_type(stream)
    assert weight is not None, "that norm's is one"
    if dtype is None:
        return
    # Of the lowering, which may have made such zeros for itself.
    width = int(weight.shape.numpy()[-1])
    zeros = token_zeros(_main(graph), closing.metadata_props[PASS_KEY], width, dtype, closing)
    spread = _like(closing, [zeros, index, kept], total, f"{total.name}.spread", tags)
    spread.attributes.pop("reduction", None)
    whole = ir.node("Add", [stream, spread.outputs[0]], name=f"{total.name}.added", metadata_props=dict(tags))
    whole.outputs[0].type, whole.outputs[0].shape = total.type, total.shape
    graph.insert_before(closing, [spread, whole])
    replace_value(total, whole.outputs[0])
    remove_with_sources(_main(graph), closing)


def _added_rows(closing: ir.Node, stream: ir.Value, index: ir.Value) -> ir.Value | None:
    """What is added to the stream's rows, by the ScatterND itself or in front of it."""
    summed = closed_branch(closing)
    if closing.attributes.get_string("reduction", "none") == "add":
        return summed
    add = producer_of(summed)
    if add is None or not is_residual_addition(add):
        return None
    kept = [value for value in add.inputs if value is not None and not _is_gathered(value, stream, index)]
    return kept[0] if len(kept) == 1 else None


def _is_gathered(value: ir.Value, stream: ir.Value, index: ir.Value) -> bool:
    """Whether these are the stream's own rows."""
    node = value.producer()
    return is_op(node, "GatherND") and list(node.inputs) == [stream, index]


def _like(
    node: ir.Node, inputs: list[ir.Value | None], output: ir.Value, name: str, metadata: Mapping[str, str]
) -> ir.Node:
    """The same operation on other values, in no graph yet; its output is typed as another one."""
    new = ir.node(node.op_type, inputs, dict(node.attributes), name=name, metadata_props=dict(metadata))
    new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = name, output.type, output.shape
    return new


def _main(graph: ir.Graph | ir.Function) -> ir.Graph:
    assert isinstance(graph, ir.Graph), "blocks stand in graphs"
    return graph
