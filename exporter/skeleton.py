"""A graph as a protobuf without its weights: small, whatever the model's size."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_SMALL_BYTES = 1024  # axes, shapes, scalars: what shape inference computes with


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """The graph with inputs in place of its large initializers, and of all that lie in data files.

    Args:
        model: Left as it is; its weights are not read.
    """
    graph = model.graph
    inputs, initializers = list(graph.inputs), list(graph.initializers.values())
    large = [value for value in initializers if _is_large(value.const_value)]
    for value in large:
        assert value.const_value is not None, "the reader has seen its contents"
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
        del graph.initializers[value.name]  # type: ignore[arg-type]  # initializers have names
    graph.inputs.extend(large)
    try:
        return ir.to_proto(model)
    finally:
        graph.inputs[:] = inputs
        graph.initializers.clear()
        for value in initializers:  # all of them, in the order they were in, which the data file follows
            graph.register_initializer(value)


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    """Whether inference does without its contents; those of a data file it would look for beside the graph."""
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return False
    return isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > _SMALL_BYTES
