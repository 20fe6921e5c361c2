"""Copy the nodes of a decoder layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import SHAPE_OPS, consumed_values, is_op, node_order, nodes_between
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.weights.storage import Place, Replacements


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
    weights: Replacements,
    rename: Callable[[str], str],
    tags: Mapping[str, str],
) -> LayerCopy:
    """Copy a layer's nodes, and what its cache passes on the way to them; whatever else it does not compute is shared.

    Args:
        layer: What to copy. None of its nodes holds a subgraph.
        reads: Values of the original that the copy reads another value for: its input stream, its past key and value.
        weights: Where the layer's weights enter, the constants that stand for theirs.
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
    # original reads (masks, rotary tables, constants are shared). Where a weight enters, the new weight does, behind
    # copies of the nodes that prepare it.
    for node in (*_cache_nodes(layer), *layer.nodes):
        inputs = [None if value is None else values.get(value, value) for value in node.inputs]
        for index, value in enumerate(node.inputs):
            constants = weights.get(Place(node, index))
            if constants is not None and value is not None:
                inputs[index] = _prepared(value, constants, copy_node)
        new = copy_node(node, inputs)
        values.update(zip(node.outputs, new.outputs, strict=True))
    cache = (
        values[layer.past_key],
        values[layer.past_value],
        values[layer.present_key],
        values[layer.present_value],
    )
    initializers = tuple(new for constants in weights.values() for new in constants.values())
    return LayerCopy(tuple(nodes), initializers, values[layer.output], cache)


def _cache_nodes(layer: DecoderLayer) -> tuple[ir.Node, ...]:
    """What stands between a layer's cache and its nodes and reads no stream: a cast, or a factor, of its keys."""
    (graph,) = {node.graph for node in layer.nodes}
    assert isinstance(graph, ir.Graph), "a layer that is copied holds no subgraph, and is in none"
    order = node_order(graph)
    # A cache's length serves the masks of all layers, and is the same for all.
    excluded = {*layer.nodes, *(node for node in order if is_op(node, *SHAPE_OPS))}
    read = [value for node in layer.nodes for value in consumed_values(node)]
    return nodes_between(order, {layer.past_key, layer.past_value}, read, excluded)


def _prepared(
    value: ir.Value,
    constants: Mapping[ir.Value, ir.Value],
    copy_node: Callable[[ir.Node, list[ir.Value | None]], ir.Node],
) -> ir.Value:
    """What stands for a value that constants are prepared into: by Cast, Transpose, or whatever else reads them."""
    if (new := constants.get(value)) is not None:
        return new
    node = value.producer()
    assert node is not None, "the value is derived from the constants"
    inputs = [
        _prepared(read, constants, copy_node) if read is not None and _comes_from(read, constants) else read
        for read in node.inputs
    ]
    if is_op(node, "Identity"):
        assert inputs[0] is not None, "Identity has an input"
        return inputs[0]
    return copy_node(node, inputs).outputs[0]


def _comes_from(value: ir.Value, constants: Mapping[ir.Value, ir.Value]) -> bool:
    while value not in constants:
        node = value.producer()
        first = None if node is None or not node.inputs else node.inputs[0]
        if first is None:
            return False
        value = first
    return True
