"""Write the routers' dot products as sums of products instead of matrix products."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, router_path
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import is_op, producer_of
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import ROUTER_SCORES, TaggedNodes, role_values, shared_constant


@dataclasses.dataclass(frozen=True)
class ReduceRouterProductsPass(GraphPass):
    """Keep routers in true float32 on GPUs.

    A float32 MatMul runs on tensor cores in TF32, which has ten bits of mantissa, unless a builder flag forbids it; and
    TensorRT-RTX has none for Turing (sm75) at all. A sum of products is float32 everywhere.

    Before::

        logits = Squeeze(MatMul(x, w), -1)                   # w [hidden, 1]

    After::

        logits = ReduceSum(Mul(x, row), -1)                  # row [hidden]

    Scope: routers of the main graph that RouteLayersPass wrote.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass,)
    nodes_from: ClassVar[Border | None] = "injected"

    def check(self, model: ir.Model) -> None:
        """There is a router.

        Raises:
            GraphPassError: There is none.
        """
        if not role_values(model.graph, ROUTER_SCORES):
            raise GraphPassError("ReduceRouterProductsPass: nothing is routed.", hint="run RouteLayersPass first")

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every router.

        Raises:
            GraphPassError: One is not of RouteLayersPass's form.
        """
        for layer, scores in sorted(role_values(model.graph, ROUTER_SCORES).items()):
            _rewrite(model.graph, layer, scores)
        return True


def _rewrite(graph: ir.Graph, layer: int, scores: ir.Value) -> None:
    # Back from the scores to the product that makes them: Sigmoid, Squeeze, MatMul.
    sigmoid = scores.producer()
    logits = sigmoid.inputs[0] if sigmoid is not None else None
    squeeze = producer_of(logits)
    column = squeeze.inputs[0] if is_op(squeeze, "Squeeze") else None
    product = producer_of(column)
    if logits is None or squeeze is None or not is_op(product, "MatMul"):
        raise GraphPassError(
            f"ReduceRouterProductsPass: router {layer}: expected Sigmoid(Squeeze(MatMul(x, w))), found "
            f"{place(sigmoid) if sigmoid is not None else 'no node'}.",
            hint="run the pass right behind RouteLayersPass",
        )
    # The same weights as one row, multiplied element by element and summed up; the Sigmoid reads the sum.
    stream, weight = product.inputs
    assert stream is not None, "MatMul has two inputs"
    assert weight is not None, "MatMul has two inputs"
    assert weight.const_value is not None, "RouteLayersPass registers its weights with their tensors"
    name, float32 = router_path(layer), ir.DataType.FLOAT
    new = TaggedNodes(ReduceRouterProductsPass.__name__, layer)
    row = shared_constant(graph, f"{name}.weight_row", weight.const_value.numpy().reshape(-1).astype(np.float32))
    axis = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))
    products = new.add("Mul", stream, row, name=f"{name}.products", dtype=float32, shape=stream.shape)
    total = new.add("ReduceSum", products, axis, name=f"{name}.sum", dtype=float32, shape=logits.shape, keepdims=0)
    # The old product goes only when nothing else reads it: another pass may have exposed the logits.
    graph.insert_before(product, new.nodes)
    replace_value(logits, total)
    remove_with_sources(graph, squeeze)
