"""How wide a projection is, where a graph does not declare it."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import constant_integers, constant_tensor, is_op
from dlo_export.graph_passes.spec.ops import MICROSOFT


def projected_width(value: ir.Value) -> int | None:
    """Size of the last axis of a projection, rotated or not: declared, or as its matrix, bias, norm or shape says."""
    value = unrotated(value)
    if value.shape is not None and isinstance(last := value.shape[-1], int):
        return last
    node = value.producer()
    if is_op(node, "MatMulNBits", domain=MICROSOFT):
        return node.attributes["N"].as_int()
    if not is_op(node, "MatMul", "Add", "RMSNormalization", "Cast", "Identity", "Reshape"):
        return None
    if is_op(node, "Reshape"):  # heads that were normalised one by one, together again
        shape = constant_integers(node.inputs[1])
        return shape[-1] if shape is not None and len(shape) == 3 and shape[-1] > 0 else None
    # A norm in float32 stands between casts, its scale behind one too: then what it reads says how wide it is.
    if is_op(node, "Cast", "Identity", "RMSNormalization") and node.inputs[0] is not None:
        width = projected_width(node.inputs[0])
        if width is not None:
            return width
    tensors = [constant_tensor(operand) for operand in node.inputs]
    sizes = [int(tensor.shape[-1]) for tensor in tensors if tensor is not None and len(tensor.shape)]  # type: ignore[arg-type]  # tensors have no symbolic dimensions
    return max(sizes, default=None)


def unrotated(value: ir.Value) -> ir.Value:
    """What rotary embedding was given: where that is zero, so is the value."""
    node = value.producer()
    while is_op(node, "RotaryEmbedding") and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value
