"""Which nodes multiply by a constant matrix, and how each stores it."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.weights.dense import DenseStorage, dense_storage
from dlo_export.graph_passes.weights.dequantize_linear import dequantized_storage
from dlo_export.graph_passes.weights.matmul_nbits import BIAS, NBitsStorage
from dlo_export.graph_passes.weights.storage import Place, WeightStorage


def linear_weight(node: ir.Node) -> WeightStorage | None:
    """The matrix of a node whose output is input · matrix, [in, out] as it multiplies; None for every other node.

    Raises:
        GraphPassError: It is such a node, and its matrix is stored in a way that is not understood.
    """
    if is_op(node, "MatMul") or (is_op(node, "Gemm") and not node.attributes.get_int("transA", 0)):
        # MatMul has no such attribute.
        layout: Literal["in_out", "out_in"] = "out_in" if node.attributes.get_int("transB", 0) == 1 else "in_out"
        return dense_storage(Place(node, 1), layout) or dequantized_storage(Place(node, 1), layout)
    if is_op(node, "MatMulNBits", domain=MICROSOFT):
        return NBitsStorage(node)
    return None


def linear_bias(node: ir.Node) -> DenseStorage | None:
    """The vector that is added to the output of such a node, by itself or by an Add behind it."""
    own = 2 if is_op(node, "Gemm") else BIAS
    if own < len(node.inputs) and node.inputs[own] is not None:
        return dense_storage(Place(node, own), "vector")
    consumers = tuple(node.outputs[0].consumers())
    if len(consumers) == 1 and is_op(consumers[0], "Add"):
        found = (dense_storage(Place(consumers[0], index), "vector") for index in (0, 1))
        return next((bias for bias in found if bias is not None and bias.shape != (1,)), None)
    return None
