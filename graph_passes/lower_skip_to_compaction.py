"""Make routed layers skip: run the MLP branch on the rows of active tokens only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graph_passes.data_flow import element_type, is_op
from graph_passes.decoder_layers import find_decoder_layers
from graph_passes.errors import GraphPassError
from graph_passes.masked_mlp import MaskedMlp, match_masked_mlp
from graph_passes.provenance import TaggedNodes, made_by, shared_constant
from graph_passes.route_layers import RouteLayersPass
from graph_passes.token_wise import row_rank

_OLDEST_OPSET = 16  # ScatterND adds from here on


@dataclasses.dataclass(frozen=True)
class LowerSkipToCompactionPass(ir.passes.InPlacePass):
    """Gather the active tokens, run norm and MLP on them, add the results back to the stream in place.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After (n tokens are active; n may be 0)::

        idx  = Transpose(NonZero(active))                    # int64 [n, 2]
        rows = GatherND(h, idx)                              # [n, hidden]
        d    = MLP(RMSNormalization(rows))                   # the same nodes, on rows
        kept = Mul(Unsqueeze(GatherND(scale, idx), -1), d)
        y    = ScatterND(h, idx, kept, reduction="add")      # indices are unique: one addition per element

    Rows are [1, n, hidden] instead where a node of the branch counts its axes from the front. ONNX Runtime's CPU kernel
    of ScatterND adds in float32 and float64 only, so a 16-bit graph lowered this way needs another runtime. Scope:
    every routed decoder layer of the main graph. Source: ONNX ScatterND-16.
    """

    runs_after: ClassVar[tuple[type[ir.passes.PassBase], ...]] = (RouteLayersPass,)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every layer in masked form.

        Raises:
            GraphPassError: Nothing is routed, or a masked layer cannot be lowered; with all reasons.
        """
        graph = model.graph
        matches = [match_masked_mlp(layer) for layer in find_decoder_layers(graph)]
        masked = [match for match in matches if isinstance(match, MaskedMlp)]
        if not masked and any(made_by(graph, type(self).__name__)):
            return ir.passes.PassResult(model, modified=False)
        problems = [match.reason for match in matches if not isinstance(match, MaskedMlp) and match.masked]
        if graph.opset_imports.get("", 0) < _OLDEST_OPSET:
            problems.append(f"the graph uses opset {graph.opset_imports.get('')}, expected {_OLDEST_OPSET} or newer")
        if not masked and not problems:
            problems.append(f"none of the {len(matches)} decoder layers is routed")
        ranks = []
        for match in masked:
            rank, reasons = row_rank(match.nodes)
            ranks.append(rank)
            problems.extend(f"layer {match.layer.index}: {reason}" for reason in reasons)
        if problems:
            raise GraphPassError(
                "LowerSkipToCompactionPass: " + "; ".join(problems) + ".",
                hint="run RouteLayersPass first, or keep the masked form (--lowering masked)",
            )
        for match, rank in zip(masked, ranks, strict=True):
            _lower(graph, match, rank)
        graph.sort()
        return ir.passes.PassResult(model, modified=True)


def _lower(graph: ir.Graph, masked: MaskedMlp, rank: int) -> None:
    layer, block, nodes = masked.layer, masked.layer.mlp, masked.nodes
    router, mlp, count = (
        f"model.routers.{layer.index}",
        f"model.layers.{layer.index}.mlp",
        f"active_tokens_{layer.index}",
    )
    int64, dtype = ir.DataType.INT64, element_type(block.stream_in)
    gather = TaggedNodes(LowerSkipToCompactionPass.__name__, layer.index)
    nonzero = gather.add("NonZero", masked.active, name=f"{router}.nonzero", dtype=int64, shape=(2, count))
    index = gather.add("Transpose", nonzero, name=f"{router}.index", dtype=int64, shape=(count, 2), perm=(1, 0))
    row_shape = (count, layer.hidden_size)
    rows = gather.add("GatherND", block.stream_in, index, name=f"{mlp}.rows", dtype=dtype, shape=row_shape)
    first_axis = shared_constant(graph, "model.routers.first_axis", np.array([0], np.int64)) if rank == 3 else None
    if first_axis is not None:
        rows = gather.add("Unsqueeze", rows, first_axis, name=f"{mlp}.rows_3d", dtype=dtype, shape=(1, *row_shape))
    stream = _stream_for_scatter(masked, gather)
    if masked.scale is not None and masked.scaling is not None:
        _scale_rows(graph, masked, gather, index, count)
    _run_on_rows(nodes, block.stream_in, rows, (count,) if rank == 2 else (1, count))
    graph.insert_before(nodes[0], gather.nodes)

    scatter = TaggedNodes(LowerSkipToCompactionPass.__name__, layer.index)
    kept, dtype = masked.kept, element_type(block.stream_operand)
    if first_axis is not None:
        kept = scatter.add("Squeeze", kept, first_axis, name=f"{mlp}.kept_rows", dtype=dtype, shape=row_shape)
    output = block.stream_out
    name = output.name or f"model.layers.{layer.index}"
    total = scatter.add("ScatterND", stream, index, kept, name=name, dtype=dtype, shape=output.shape, reduction="add")
    graph.insert_before(block.add, scatter.nodes)
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    output.name = f"{name}.masked"  # the value is gone in a moment; until then no two may share a name
    _remove_unused(graph, block.add)


def _stream_for_scatter(masked: MaskedMlp, new: TaggedNodes) -> ir.Value:
    """The stream operand of the addition, for all tokens.

    Casts between h and the addition that also feed the branch are about to run on rows: they get a copy.
    """
    chain: list[ir.Node] = []
    value = operand = masked.layer.mlp.stream_operand
    while value is not masked.layer.mlp.stream_in:
        node = value.producer()
        assert node is not None, "the operand is the stream behind Cast and Identity"
        chain.append(node)
        value = node.inputs[0] or value
    if not set(chain) & set(masked.nodes):
        return operand
    for node in reversed(chain):
        source = node.outputs[0]
        to: dict[str, Any] = {"to": node.attributes["to"].as_int()} if is_op(node, "Cast") else {}
        name = f"{source.name}.all_tokens"
        value = new.add(node.op_type, value, name=name, dtype=element_type(source), shape=source.shape, **to)
    return value


def _scale_rows(graph: ir.Graph, masked: MaskedMlp, new: TaggedNodes, index: ir.Value, count: str) -> None:
    """Multiply rows by the scale of their own token."""
    assert masked.scale is not None, "called for scaled branches"
    assert masked.scaling is not None, "called for scaled branches"
    router, dtype = f"model.routers.{masked.layer.index}", element_type(masked.scale)
    axis = shared_constant(graph, "model.routers.last_axis", np.array([-1], np.int64))
    scale = new.add("GatherND", masked.scale, index, name=f"{router}.scale_rows", dtype=dtype, shape=(count,))
    column = new.add("Unsqueeze", scale, axis, name=f"{router}.scale_row_column", dtype=dtype, shape=(count, 1))
    position = 1 if masked.scaling.inputs[0] in {output for node in masked.nodes for output in node.outputs} else 0
    old = masked.scaling.inputs[position]
    masked.scaling.replace_input_with(position, column)
    if old is not None and not old.uses() and (producer := old.producer()) is not None:
        _remove_unused(graph, producer)


def _run_on_rows(nodes: Sequence[ir.Node], stream: ir.Value, rows: ir.Value, leading: tuple[int | str, ...]) -> None:
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is stream:
                node.replace_input_with(position, rows)
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape((*leading, output.shape[2]))


def _remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node and whatever only served it: the Where, the Unsqueeze of its condition, the zero."""
    operands = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in operands:
        source = value.producer()
        if value.uses() or value.is_graph_output() or value.name is None:
            continue
        if value.is_initializer() and not value.is_graph_input():
            graph.initializers.pop(value.name, None)
        elif source is not None and not any(output.uses() for output in source.outputs):
            _remove_unused(graph, source)
