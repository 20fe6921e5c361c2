"""Which values depend on which, and which are constant: the questions every structural search asks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.spec.ops import MICROSOFT

# Ops whose output is their first input, up to the element type: the value "passes through" them.
PASS_THROUGH_OPS = frozenset({"Cast", "Identity"})
# Ops that read only the shape of their input.
SHAPE_OPS = frozenset({"Shape", "Size"})
# Domains and types of ops that normalise along the last axes and scale by a weight, their second input.
NORM_OPS = (
    ("", "RMSNormalization"),
    ("", "LayerNormalization"),
    # ONNX Runtime registers this contrib op in the default domain; some exporters write com.microsoft.
    ("", "SimplifiedLayerNormalization"),
    (MICROSOFT, "SimplifiedLayerNormalization"),
)


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Whether a node is one of the given ops of a domain (False for None, the producer of graph inputs)."""
    return node is not None and node.domain == domain and node.op_type in op_types


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None where there is no value, or it is an input or an initializer."""
    return None if value is None else value.producer()


def behind(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """What a value is made of by nodes of these ops alone, each from its first input; the value itself by default."""
    while is_op(node := producer_of(value), *op_types):
        value = node.inputs[0]
    return value


def node_order(graph: ir.Graph) -> dict[ir.Node, int]:
    """Position of every node of the main graph; a valid ONNX graph lists its nodes topologically."""
    return {node: index for index, node in enumerate(graph)}


def consumed_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values a node reads: its inputs and what its subgraphs capture from outside."""
    for value in node.inputs:
        if value is not None:
            yield value
    for subgraph in subgraphs_of(node):
        yield from captured_values(subgraph)


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Graphs a node holds as attributes: branches of an If, the body of a Loop."""
    # The dictionary itself: this is asked of every node of every search, and half of the time was the way around it.
    for attribute in node.attributes.data.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def captured_values(subgraph: ir.Graph) -> Iterator[ir.Value]:
    """Values of the graph around it that a subgraph reads or gives out."""
    # Whatever a subgraph does not define itself, before it reads it, comes from around it.
    inner = set(subgraph.inputs) | set(subgraph.initializers.values())
    for node in subgraph:
        for value in consumed_values(node):
            if value not in inner:
                yield value
        inner.update(node.outputs)
    yield from (value for value in subgraph.outputs if value not in inner)


def pass_through_values(value: ir.Value) -> dict[ir.Value, None]:
    """The value and every value that is the same up to Cast and Identity, nearest first."""
    found: dict[ir.Value, None] = {value: None}
    waiting = [value]
    while waiting:
        for node in waiting.pop().consumers():
            if is_op(node, *PASS_THROUGH_OPS) and node.outputs[0] not in found:
                found[node.outputs[0]] = None
                waiting.append(node.outputs[0])
    return found


def nodes_between(
    order: Mapping[ir.Node, int],
    sources: Collection[ir.Value],
    targets: Iterable[ir.Value],
    excluded: Collection[ir.Node] = (),
) -> tuple[ir.Node, ...]:
    """Nodes on any path from a source to a target, by data or by shape, in topological order.

    Args:
        order: Position of every node, from `node_order`.
        sources: Where paths begin; the search does not look behind them.
        targets: Where paths end.
        excluded: Nodes that paths may not use.

    Returns:
        The nodes, empty when no target depends on a source.
    """
    # Backwards from the targets to everything behind the first source, then forwards, keeping what a source reaches.
    waiting = [target.producer() for target in targets if target not in sources]
    if not waiting:
        return ()
    producers = [source.producer() for source in sources]
    start = min((order.get(node, -1) if node is not None else -1 for node in producers), default=-1)
    ancestors: set[ir.Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in ancestors or node in excluded or order.get(node, -1) <= start:
            continue
        ancestors.add(node)
        waiting.extend(value.producer() for value in consumed_values(node) if value not in sources)
    # What only shapes or constants lead to was an ancestor, but lies on no path from a source.
    reached = set(sources)
    between: list[ir.Node] = []
    for node in sorted(ancestors, key=order.__getitem__):
        if any(value in reached for value in consumed_values(node)):
            between.append(node)
            reached.update(node.outputs)
    return tuple(between)


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a value that is an initializer, a Constant node, or either behind Identity nodes."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return None if value.is_graph_input() else tensor
        node = value.producer()
        value = node.inputs[0] if is_op(node, "Identity") else None
    return None


# What may stand between constants and what computes with them. A DequantizeLinear of constants has constant scales.
_CONSTANT_FOLDED = ("Cast", "Transpose", "DequantizeLinear")


def constant_behind(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The initializer or Constant output a value is derived from, and how many transposes lie between."""
    transposes = 0
    while value is not None:
        if ir.convenience.get_const_tensor(value) is not None and not value.is_graph_input():
            return value, transposes
        node = value.producer()
        if not is_op(node, "Identity", "Cast", "Transpose"):
            return None
        transposes += node.op_type == "Transpose"
        value = node.inputs[0]
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is computed from constants only, through Identity, Cast, Transpose and DequantizeLinear."""
    return value is not None and value in ConstantValues()


class ConstantValues:
    """Which values `is_constant` holds for, in a graph that does not change meanwhile: each one is looked at once.

    Asked one by one, every value of a long chain would be followed to the chain's beginning.
    """

    def __init__(self) -> None:
        self._known: dict[ir.Value, bool] = {}

    def __contains__(self, value: ir.Value) -> bool:
        path: list[ir.Value] = []
        current: ir.Value | None = value
        while current is not None and current not in self._known and ir.convenience.get_const_tensor(current) is None:
            path.append(current)
            node = current.producer()
            current = node.inputs[0] if is_op(node, "Identity", *_CONSTANT_FOLDED) else None
        found = current is not None and self._known.get(current, not current.is_graph_input())
        self._known.update(dict.fromkeys(path, found))
        return found


def constant_scalar(value: ir.Value | None) -> float | None:
    """The number a constant of one element holds, else None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    return float(np.asarray(tensor.numpy()).reshape(()).astype(np.float64))


def constant_integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers a small constant holds (axes, shapes), else None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > 16 or tensor.dtype not in {ir.DataType.INT64, ir.DataType.INT32}:
        return None
    return tuple(int(number) for number in np.asarray(tensor.numpy()).reshape(-1))


def rank(value: ir.Value) -> int | None:
    """Number of dimensions of a value, None when the graph does not say."""
    tensor = constant_tensor(value)
    if tensor is not None:
        return len(tensor.shape)
    return None if value.shape is None else len(value.shape)


# Ops whose output has the element type of an input, and which input that is.
_TYPED_BY_INPUT = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Gather", "GatherND", "Identity", "Reshape"), 0),
    **dict.fromkeys(("ScatterND", "RMSNormalization", "Swish", "Sigmoid", "Unsqueeze", "Squeeze", "Transpose"), 0),
    "RotaryEmbedding": 0,
    "Where": 1,
}


def element_type(value: ir.Value) -> ir.DataType | None:
    """Element type of a value, read from its producers where the graph does not annotate it; None if unknown."""
    current: ir.Value | None = value
    while current is not None and current.dtype is None:
        node = current.producer()
        if is_op(node, "Cast"):
            return ir.DataType(node.attributes["to"].as_int())
        if node is None or node.domain or node.op_type not in _TYPED_BY_INPUT:
            return None
        current = node.inputs[_TYPED_BY_INPUT[node.op_type]]
    return None if current is None else current.dtype
