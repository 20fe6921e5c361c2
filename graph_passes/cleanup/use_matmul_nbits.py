"""Multiply by a routed block's codes in one operator, as ONNX Runtime does with a DequantizeLinear outside branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op, producer_of
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.masked_blocks import match_masked_blocks
from dlo_export.graph_passes.find.masked_branch import Mismatch
from dlo_export.graph_passes.naming import unique_names
from dlo_export.graph_passes.rewriting import remove_unused, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, PASS_KEY
from dlo_export.graph_passes.weights.dequantize_linear import DequantizedStorage, dequantized_storage
from dlo_export.graph_passes.weights.matmul_nbits import EIGHT_BIT_ACTIVATIONS, packed_codes
from dlo_export.graph_passes.weights.storage import Place

_SMALLEST_BLOCK = 16  # of MatMulNBits


@dataclasses.dataclass(frozen=True)
class UseMatMulNBitsPass(GraphPass):
    """Put one MatMulNBits in place of the DequantizeLinear and the MatMul of each weight of a masked block.

    Before::

        w = DequantizeLinear <axis=0, block_size=32> (codes, scales)     # int4[in, out], float[in / 32, out]
        y = MatMul(x, w)

    After::

        y = com.microsoft.MatMulNBits <K, N, bits=4, block_size=32, accuracy_level=4> (x, packed, turned)

    ONNX Runtime 1.32 makes the same of the two when it loads the main graph, bit for bit. In a branch of an If it
    tries to, misses the weight, which stands outside, and does not load the graph; and a DequantizeLinear outside of
    the branch runs in every step. So this comes before a lowering that moves blocks into branches.

    Optional: weights that are dense, or that ONNX Runtime would not fuse so (a scale for each output, codes or scales
    that several nodes read, a Transpose or a Gemm behind them), are left alone: it multiplies by these as they are, and
    would round the other factor to 8 bits here. Scope: the blocks of the main graph that have a mask.
    Source: ONNX Runtime's DQMatMulToMatMulNBits; com.microsoft.MatMulNBits-1.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass,)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Replace every such pair."""
        graph = model.graph
        found = list(_products(graph))
        unique = unique_names(graph)
        for layer, node, weight in found:
            # The codes are stored anew, packed and turned; they are computed when they are written.
            rows, columns = weight.shape
            parts = packed_codes(weight.constants[0].name or "weight", weight, unique)
            for part in parts:
                graph.register_initializer(part)
            product = ir.node(
                "MatMulNBits",
                [node.inputs[0], *parts],
                {
                    "K": columns,
                    "N": rows,
                    "bits": weight.bits,
                    "block_size": weight.block,
                    "accuracy_level": EIGHT_BIT_ACTIVATIONS,  # as ONNX Runtime has it where it fuses the two itself
                },
                domain=MICROSOFT,
                name=node.name,
                metadata_props={PASS_KEY: self._name, LAYER_KEY: str(layer)},
            )
            output = product.outputs[0]
            output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
            graph.insert_before(node, product)
            replace_value(node.outputs[0], output)
            graph.remove(node, safe=True)
        # With the products go the nodes that dequantised, and what they read.
        if found:
            graph.opset_imports.setdefault(MICROSOFT, 1)
            remove_unused(graph)
        return bool(found)


def _products(graph: ir.Graph) -> Iterator[tuple[int, ir.Node, DequantizedStorage]]:
    """Layer, node and weight of each product that ONNX Runtime would fuse."""
    for layer in find_decoder_layers(graph):
        matches = [match for _, match in match_masked_blocks(layer) if not isinstance(match, Mismatch)]
        for node in (node for match in matches for node in match.nodes):
            if not is_op(node, "MatMul") or not _is_fused(node.inputs[1]):
                continue
            weight = dequantized_storage(Place(node, 1), "in_out")
            if weight is not None and weight.block >= _SMALLEST_BLOCK and not weight.block & (weight.block - 1):
                yield layer.index, node, weight


def _is_fused(weight: ir.Value | None) -> bool:
    """Whether a product's weight is dequantised by blocks for it alone, from codes and scales that nobody shares."""
    source = producer_of(weight)
    if not is_op(source, "DequantizeLinear") or not source.attributes.get_int("block_size", 0):
        return False
    own = (weight, *source.inputs[:2])
    return all(value is not None and len(value.uses()) == 1 and not value.is_graph_output() for value in own)
