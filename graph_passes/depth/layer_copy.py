"""Copy the nodes of a decoder layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.projections import Projection


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCopy:
    """The copy of one layer.

    Attributes:
        nodes: New nodes, topologically ordered, not yet in a graph.
        initializers: New weights, not yet registered.
        output: Residual stream behind the copy.
        cache: past key, past value (new graph inputs), present key, present value.
    """

    nodes: tuple[ir.Node, ...]
    initializers: tuple[ir.Value, ...]
    output: ir.Value
    cache: tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def copy_layer(
    layer: DecoderLayer,
    reads: Mapping[ir.Value, ir.Value],
    weights: Mapping[Projection, ir.Value],
    rename: Callable[[str], str],
    tags: Mapping[str, str],
) -> LayerCopy:
    """Copy a layer's nodes; whatever the layer does not compute itself is shared.

    Args:
        layer: What to copy. None of its nodes holds a subgraph.
        reads: Values of the original that the copy reads another value for: its input stream, its past key and value.
        weights: New initializer for each of the layer's weights.
        rename: Gives a copy's name for an original's.
        tags: Metadata of every new node.
    """
    values = dict(reads)
    nodes: list[ir.Node] = []

    def copy_node(node: ir.Node, inputs: list[ir.Value | None]) -> ir.Node:
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes,
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=rename(node.name or node.op_type),
            metadata_props={**node.metadata_props, **tags},
        )
        # Types are shared; a shape belongs to one value, since passes change it in place.
        for old_output, output in zip(node.outputs, new.outputs, strict=True):
            output.name = rename(old_output.name) if old_output.name else old_output.name
            output.type = old_output.type
            output.shape = None if old_output.shape is None else old_output.shape.copy()
        nodes.append(new)
        return new

    # Node by node, in order: a copy reads what was copied before it, the replacements in `reads`, and else what the
    # original reads (masks, rotary tables, constants are shared). Where a weight enters, the new weight does, behind a
    # copy of the Cast or Transpose that prepares it.
    places = {(projection.node, projection.input_index): projection for projection in weights}
    for node in layer.nodes:
        inputs = [None if value is None else values.get(value, value) for value in node.inputs]
        for index, value in enumerate(node.inputs):
            projection = places.get((node, index))
            if projection is None or value is None:
                continue
            weight = weights[projection]
            for step in _preparation(value, projection.weight):
                weight = copy_node(step, [weight, *step.inputs[1:]]).outputs[0]
            inputs[index] = weight
        new = copy_node(node, inputs)
        values.update(zip(node.outputs, new.outputs, strict=True))
    cache = (
        values[layer.past_key],
        values[layer.past_value],
        values[layer.present_key],
        values[layer.present_value],
    )
    return LayerCopy(tuple(nodes), tuple(weights.values()), values[layer.output], cache)


def _preparation(value: ir.Value, weight: ir.Value) -> Iterator[ir.Node]:
    """Cast and Transpose nodes between a stored weight and the value that is read, first one first."""
    steps: list[ir.Node] = []
    while value is not weight:
        node = value.producer()
        assert node is not None, "the value is derived from the weight"
        assert node.inputs[0] is not None, "Cast, Transpose and Identity have an input"
        if not is_op(node, "Identity"):
            steps.append(node)
        value = node.inputs[0]
    return reversed(steps)
