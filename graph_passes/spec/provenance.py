"""Nodes that say which pass made them, and what they mean, in their metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import LAYER_NUMBER
from dlo_export.graph_passes.errors import GraphPassError, place

PASS_KEY = "dlo.pass"
LAYER_KEY = "dlo.layer"
ORIGIN_KEY = "dlo.origin"
"""Of an injected layer's nodes: which layer they derive from."""
ROLE_KEY = "dlo.role"
CLOSES_KEY = "dlo.closes"
"""Of the node that closes a routed block: the number of its input that carries the branch."""
SERVES_KEY = "dlo.serves"
"""Of nodes that read one value: "active" where they serve active tokens only, "all" beside those; or the "router"."""

THRESHOLD_KEY = "dlo.threshold"
"""Of a decision by logits: the score that an active token's exceeds."""

Role = Literal["router_scores", "router_logits", "router_active"]
ROUTER_SCORES: Role = "router_scores"
ROUTER_LOGITS: Role = "router_logits"
"""Of what a decision compares where a graph computes no scores; `find/routers.py` reads every form."""
ROUTER_ACTIVE: Role = "router_active"
Attribute = int | float | str | Sequence[int] | ir.TensorProtocol
Dims = Iterable[int | str | ir.SymbolicDim | None]


def layer_of(node: ir.Node) -> int | None:
    """The decoder layer that a node was made for; None for one that serves all of them, or was not made by a pass.

    Raises:
        GraphPassError: The node's metadata name no layer.
    """
    number = node.metadata_props.get(LAYER_KEY)
    if number is not None and not re.fullmatch(LAYER_NUMBER, number):
        raise _damaged(node, LAYER_KEY, "the number of a decoder layer")
    return None if number is None else int(number)


def role_values(graph: ir.Graph, role: Role) -> dict[int, ir.Value]:
    """Output of the node that plays a router's role, by layer.

    Raises:
        GraphPassError: A node that plays it does not say for which layer.
    """
    found: dict[int, ir.Value] = {}
    for node in graph:
        if node.metadata_props.get(ROLE_KEY) != role:
            continue
        layer = layer_of(node)
        if layer is None:
            raise _damaged(node, LAYER_KEY, "the number of a decoder layer")
        found[layer] = node.outputs[0]
    return found


def closed_branch(node: ir.Node) -> ir.Value | None:
    """The branch that a node joins with the residual stream, None for a node that closes no routed block.

    The pass that writes such a node tags it, whatever the node is; so a layer is found in the form of any lowering.

    Raises:
        GraphPassError: The node's metadata name no input of it.
    """
    number = node.metadata_props.get(CLOSES_KEY)
    if number is None:
        return None
    inputs = {str(index): value for index, value in enumerate(node.inputs)}
    if number not in inputs:
        raise _damaged(node, CLOSES_KEY, f"the number of one of its {len(inputs)} inputs")
    return inputs[number]


def _damaged(node: ir.Node, key: str, expected: str) -> GraphPassError:
    return GraphPassError(
        f"{place(node)}: metadata '{key}' is {node.metadata_props.get(key)!r}, expected {expected}",
        hint="take the metadata out of the graph, or export it again",
    )


class TaggedNodes:
    """New nodes of one decoder layer, in order, each tagged with the pass that makes it.

    Args:
        made_by: Name of the pass class.
        layer: Index of the decoder layer; None for what serves all of them.

    Attributes:
        nodes: Those added so far.
        tags: Metadata of every node.
    """

    def __init__(self, made_by: str, layer: int | None) -> None:
        self.layer = layer
        self.nodes: list[ir.Node] = []
        self.tags = {PASS_KEY: made_by, **({} if layer is None else {LAYER_KEY: str(layer)})}

    def add(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        dtype: ir.DataType | None,
        shape: Dims | None,
        role: Role | None = None,
        closes: int | None = None,
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Append a node of one output, both of the same name.

        Args:
            op_type: Its op.
            *inputs: Its inputs.
            name: Name of the node and of its output.
            dtype: Element type of the output, None where unknown.
            shape: Dimensions of the output, None where unknown.
            role: What later passes look the node up by.
            closes: For the node that closes a routed block, the number of its input that carries the branch.
            domain: Of the op.
            **attributes: Its attributes.

        Returns:
            The output.
        """
        tags = dict(self.tags)
        if role is not None:
            tags[ROLE_KEY] = role
        if closes is not None:
            tags[CLOSES_KEY] = str(closes)
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name, metadata_props=tags)
        output = node.outputs[0]
        output.name = name
        if dtype is not None:
            output.dtype = dtype
        if shape is not None:
            output.shape = ir.Shape(shape)
        self.nodes.append(node)
        return output


def shared_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of this name, made on first use; of another name where a foreign graph has given this one."""
    # The name stands for the contents: layers share what they compute with alike.
    wanted, number = name, 1
    while (existing := graph.initializers.get(name)) is not None:
        if existing.const_value is not None and _holds(existing.const_value, array):
            return existing
        name, number = f"{wanted}_{number}", number + 1
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def shared_node(
    graph: ir.Graph,
    op_type: str,
    source: ir.Value,
    *others: ir.Value,
    name: str,
    tags: Mapping[str, str],
    dtype: ir.DataType,
    shape: Dims | None,
    before: ir.Node,
    **attributes: Any,
) -> ir.Value:
    """The output of the node of this name that reads `source`, made on first use.

    Args:
        graph: Main graph.
        op_type: Its op.
        source: Its first input.
        *others: Its other inputs.
        name: Of the node and of its output; stands for what it computes.
        tags: Of the node, as `TaggedNodes` has them; a node of another pass is not shared.
        dtype: Element type of the output.
        shape: Dimensions of the output, None where unknown.
        before: Where it is inserted; the graph needs sorting where somebody before it reads it later.
        **attributes: Its attributes.
    """
    for node in source.consumers():
        if node.name == name and node.metadata_props.get(PASS_KEY) == tags[PASS_KEY]:
            return node.outputs[0]
    layer = tags.get(LAYER_KEY)
    new = TaggedNodes(tags[PASS_KEY], None if layer is None else int(layer))
    value = new.add(op_type, source, *others, name=name, dtype=dtype, shape=shape, **attributes)
    graph.insert_before(before, new.nodes)
    return value


def _holds(tensor: ir.TensorProtocol, array: np.ndarray) -> bool:
    return (
        tensor.dtype == ir.DataType.from_numpy(array.dtype)
        and tuple(tensor.shape.numpy()) == array.shape
        and np.array_equal(tensor.numpy(), array)
    )
