"""Multiply routers' weights as rows: a CPU then reads a router's weights once, and nothing beside them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.find.data_flow import producer_of
from dlo_export.graph_passes.find.routers import find_routers, router_operands, single_axis
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.routing.fuse_router_gather import FuseRouterGatherPass
from dlo_export.graph_passes.routing.fuse_router_scores import FuseRouterScoresPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import SERVES_KEY, TaggedNodes, shared_constant


@dataclasses.dataclass(frozen=True)
class MultiplyRouterRowsPass(GraphPass):
    """Multiply a router's weights from the left, as one row, by the transposed stream.

    Before::

        logits = Squeeze(MatMul(x, w), -1)                                  # w [hidden, 1]

    After::

        logits = Squeeze(MatMul(row, Transpose<perm=[0, 2, 1]>(x)), 1)    # row [1, hidden]

    ONNX Runtime's CPU provider packs a constant right operand in panels of 16 columns. Of a router's one it makes 16:
    37 KB for a hidden size of 576, which every step reads from memory anew. A constant left operand stays as it is, and
    Transpose and MatMul become one FusedMatMul, a dot product per token.

    Optional: weights that somebody else reads, and routers in another form, are left alone.
    Scope: routers of the main graph in the form RouteLayersPass writes.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (
        RouteLayersPass,
        LoweringPass,
        FuseRouterGatherPass,
        FuseRouterScoresPass,
    )
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every router whose weights are a column."""
        found = _scores_of_columns(model.graph)
        for layer, product in found.items():
            self._rewrite(model.graph, layer, product)
        return bool(found)

    def _rewrite(self, graph: ir.Graph, layer: int, product: ir.Node) -> None:
        ((squeeze, _),) = product.outputs[0].uses()
        (stream, weight), logits = product.inputs, squeeze.outputs[0]
        assert stream is not None, "MatMul has two inputs"
        assert weight is not None, "MatMul has two inputs"
        assert weight.const_value is not None, "its shape was looked at"

        # The same numbers in the same order, under the same name.
        weight.const_value = ir.tensor(weight.const_value.numpy().reshape(1, -1), name=weight.name)
        weight.shape = ir.Shape(weight.const_value.shape.numpy())
        router, new, float32 = router_path(layer), TaggedNodes(self._name, layer), ir.DataType.FLOAT
        batch, sequence = (None, None) if logits.shape is None else (logits.shape[0], logits.shape[1])
        shape, name = (batch, weight.shape[1], sequence), f"{router}.stream_columns"
        columns = new.add("Transpose", stream, name=name, dtype=float32, shape=shape, perm=(0, 2, 1))
        shape, name = (batch, 1, sequence), f"{router}.logits_row"
        row = new.add("MatMul", weight, columns, name=name, dtype=float32, shape=shape)
        for node in new.nodes:
            node.metadata_props[SERVES_KEY] = "router"
        name = f"{router}.row_logits"
        tokens = new.add("Squeeze", row, single_axes(graph, row), name=name, dtype=float32, shape=logits.shape)
        graph.insert_before(product, new.nodes)
        replace_value(logits, tokens)
        remove_with_sources(graph, squeeze)


def single_axes(graph: ir.Graph, product: ir.Value) -> ir.Value:
    """What a Squeeze or Unsqueeze is told of a router's product's `single_axis`: int64 [1], one for all layers.

    Args:
        graph: Takes the constant.
        product: A MatMul's output.
    """
    if single_axis(product) == 1:
        return shared_constant(graph, f"{ROUTERS}.row_axis", np.array([1], np.int64))
    return shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))


def multiplies_columns(graph: ir.Graph) -> bool:
    """Whether a router's weights are a column: never behind `MultiplyRouterRowsPass`, unless somebody else reads it."""
    products = [router.product for router in find_routers(graph).values()]
    return any(product is not None and single_axis(product) == 2 for product in products)


def _scores_of_columns(graph: ir.Graph) -> dict[int, ir.Node]:
    """The products of scores whose weights are a column that nothing else reads, by layer."""
    found = {}
    for layer, router in find_routers(graph).items():
        if router.scores is None or router_operands(router.scores) is None:
            continue
        product, weight = producer_of(router.product), router.weight
        assert product is not None, "it has operands"
        assert weight is not None, "likewise"
        if all(len(tuple(value.uses())) == 1 and not value.is_graph_output() for value in (weight, *product.outputs)):
            found[layer] = product
    return found
