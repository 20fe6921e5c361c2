"""Graphs whose products round to 8 bits what quantised weights are multiplied by, and what they are without that."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.weights.matmul_nbits import EIGHT_BIT_ACTIVATIONS


def rounds_activations(graph: ir.Graph) -> bool:
    """Whether a product of the graph rounds so: by its `accuracy_level`, or once ONNX Runtime has fused it."""
    return asks_to_round(graph) or any(is_op(node, "DequantizeLinear") for node in graph.all_nodes())


def asks_to_round(graph: ir.Graph) -> bool:
    """Whether a product of the graph is told to round so."""
    products = (node for node in graph.all_nodes() if is_op(node, "MatMulNBits", domain=MICROSOFT))
    return any(node.attributes.get_int("accuracy_level", 0) == EIGHT_BIT_ACTIVATIONS for node in products)


def with_exact_products(model: ir.Model) -> ir.Model:
    """A copy that asks no product to round; run it with `exact_products`, so that none is fused into one that does."""
    exact = ir.from_proto(ir.to_proto(model))
    for node in exact.graph.all_nodes():
        if is_op(node, "MatMulNBits", domain=MICROSOFT):
            node.attributes.pop("accuracy_level", None)
    return exact
