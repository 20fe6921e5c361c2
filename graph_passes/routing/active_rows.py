"""What every lowering that runs the MLP on gathered rows shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp, match_masked_mlp
from dlo_export.graph_passes.spec.provenance import TaggedNodes, made_by, shared_constant

# Why a masked layer cannot be lowered; none if it can.
Check = Callable[[MaskedMlp], Sequence[str]]


def masked_layers(graph: ir.Graph, asking: str, *, oldest_opset: int, check: Check) -> list[MaskedMlp]:
    """Every routed layer, all of them fit for the lowering that asks; empty where it has run before.

    Args:
        graph: Routed.
        asking: Name of the pass.
        oldest_opset: That the lowering can write.
        check: Called for every layer.

    Raises:
        GraphPassError: Nothing is routed, or a masked layer cannot be lowered; with all reasons.
    """
    if any(made_by(graph, asking)):
        return []
    matches = [match_masked_mlp(layer) for layer in find_decoder_layers(graph)]
    masked = [match for match in matches if isinstance(match, MaskedMlp)]
    problems = [match.reason for match in matches if not isinstance(match, MaskedMlp) and match.masked]
    if graph.opset_imports.get("", 0) < oldest_opset:
        problems.append(f"the graph uses opset {graph.opset_imports.get('')}, expected {oldest_opset} or newer")
    if not masked and not problems:
        problems.append(f"none of the {len(matches)} decoder layers is routed")
    problems += [f"layer {match.layer.index}: {reason}" for match in masked for reason in check(match)]
    if problems:
        raise GraphPassError(
            f"{asking}: " + "; ".join(problems) + ".",
            hint="route the layers first, or choose another --lowering: masked is always possible",
        )
    return masked


def stream_for_all_tokens(masked: MaskedMlp, new: TaggedNodes) -> ir.Value:
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


def scale_rows(
    graph: ir.Graph,
    masked: MaskedMlp,
    new: TaggedNodes,
    gather: Callable[[ir.Value], ir.Value],
    count: str,
) -> None:
    """Multiply rows by the scale of their own token.

    Args:
        graph: Of the layer.
        masked: The layer, its branch scaled per token.
        new: Takes the new nodes.
        gather: From the scale of all tokens [batch, sequence] to that of the rows [count].
        count: Name of the number of rows.
    """
    assert masked.scale is not None, "called for scaled branches"
    assert masked.scaling is not None, "called for scaled branches"
    router, dtype = f"model.routers.{masked.layer.index}", element_type(masked.scale)
    axis = shared_constant(graph, "model.routers.last_axis", np.array([-1], np.int64))
    scale = gather(masked.scale)
    column = new.add("Unsqueeze", scale, axis, name=f"{router}.scale_row_column", dtype=dtype, shape=(count, 1))
    position = 1 if masked.scaling.inputs[0] in {output for node in masked.nodes for output in node.outputs} else 0
    old = masked.scaling.inputs[position]
    masked.scaling.replace_input_with(position, column)
    if old is not None and not old.uses() and (producer := old.producer()) is not None:
        remove_with_sources(graph, producer)


def run_on_rows(nodes: Sequence[ir.Node], stream: ir.Value, rows: ir.Value, leading: tuple[int | str, ...]) -> None:
    """Makes the branch's nodes read rows [*leading, hidden] instead of the stream [batch, sequence, hidden]."""
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is stream:
                node.replace_input_with(position, rows)
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape((*leading, output.shape[2]))


def remove_with_sources(graph: ir.Graph, node: ir.Node) -> None:
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
            remove_with_sources(graph, source)
