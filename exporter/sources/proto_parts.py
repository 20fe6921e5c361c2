"""Nodes, graphs and tensors of a model as protobuf has it, wherever they stand; whether tensors hold what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx_ir as ir

_LARGEST_TENSOR = 2**62  # bytes; far beyond any file, and still an int64
# The field of a TensorProto that holds elements of a type where raw_data does not, and how many entries an element has.
_ELEMENT_FIELDS = {
    **dict.fromkeys(("FLOAT", "COMPLEX64"), "float_data"),
    **dict.fromkeys(("DOUBLE", "COMPLEX128"), "double_data"),
    **dict.fromkeys(("INT64",), "int64_data"),
    **dict.fromkeys(("UINT32", "UINT64"), "uint64_data"),
}


def nodes_of(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, of subgraphs and functions too."""
    for owner in (*proto.functions, *graphs_of(proto)):
        yield from owner.node


def graphs_of(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and all subgraphs, those inside functions too."""
    waiting = [proto.graph]
    waiting += [graph for function in proto.functions for node in function.node for graph in _subgraphs(node)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [inner for node in graph.node for inner in _subgraphs(node)]


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def placed_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto, bool]]:
    """Every tensor with its place, and whether it is a constant of its own: an initializer, a Constant's value."""
    for graph in graphs_of(proto):
        yield from (("initializer", tensor, True) for tensor in graph.initializer)
    for node in nodes_of(proto):
        for attribute in node.attribute:
            place = f"{attribute.name} of {node.op_type} node '{node.name}' ({', '.join(node.output)}), tensor"
            is_constant = node.op_type == "Constant" and attribute.name == "value"
            if attribute.HasField("t"):
                yield place, attribute.t, is_constant
            yield from ((place, tensor, False) for tensor in attribute.tensors)
            sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for tensor in (*sparse, *attribute.sparse_tensors):
                yield from ((place, part, False) for part in (tensor.values, tensor.indices))


def tensor_problems(proto: onnx.ModelProto) -> Iterator[str]:
    """Tensors inside the file whose contents are not as long as their type and dimensions say, with their places."""
    for place, tensor, _ in placed_tensors(proto):
        try:
            check_tensor(tensor)
        except ValueError as err:
            yield f"{place} '{tensor.name}': {err}"


def check_tensor(tensor: onnx.TensorProto) -> None:
    """That its contents are as long as its type and dimensions say.

    Raises:
        ValueError: They are not, or it has no such type or dimensions.
    """
    dims = list(tensor.dims)
    if any(dim < 0 for dim in dims):
        raise ValueError(f"has dimensions {dims}, expected none below 0")
    if tensor.data_type == onnx.TensorProto.UNDEFINED or tensor.data_type not in set(ir.DataType):
        raise ValueError(f"has element type {tensor.data_type}, which is none of ONNX's")
    count, kind = math.prod(dims), ir.DataType(tensor.data_type)
    if count * 16 > _LARGEST_TENSOR:
        raise ValueError(f"has dimensions {dims}, more than any file holds")
    if kind == ir.DataType.STRING:
        raise ValueError("holds strings, expected numbers")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        expected = math.ceil(count * kind.itemsize)
        if len(tensor.raw_data) != expected:
            raise ValueError(f"{kind.name}{dims} has {len(tensor.raw_data)} bytes, expected {expected}")
        return
    field = _ELEMENT_FIELDS.get(kind.name, "int32_data")
    packed = kind.bitwidth if kind.bitwidth < 8 and field == "int32_data" else 8
    expected = math.ceil(count * packed / 8) * (2 if kind.name.startswith("COMPLEX") else 1)
    if len(getattr(tensor, field)) != expected:
        raise ValueError(f"{kind.name}{dims} has {len(getattr(tensor, field))} elements, expected {expected}")
