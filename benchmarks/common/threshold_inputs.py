"""Routers whose thresholds are graph inputs: a benchmark decides who is active, and routing costs what it costs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.find.routers import find_routers, single_axis
from dlo_export.graph_passes.spec.provenance import shared_constant

SKIPPED, ACTIVE = 3e38, -3e38  # thresholds above and below every score and every logit


def threshold_name(layer: int | str) -> str:
    """Graph input float32, what an active token exceeds: [batch, sequence], or with its router's product's axes."""
    return f"threshold.{layer}"


def thresholds_as_inputs(model: ir.Model) -> None:
    """Lets every router compare its scores or logits with an input of their axes, which is SKIPPED or ACTIVE.

    An operator that decides by itself has one threshold for all tokens: it multiplies the input by -1 in place of the
    stream by its router's weight, which costs a little less.
    """
    graph = model.graph
    for layer, router in find_routers(graph).items():
        axes: list[str | int] = ["batch", "sequence"]
        if router.gathering is not None or router.logits is not None:
            axes.insert(2 if router.logits is None else single_axis(router.logits), 1)
        limit = ir.val(threshold_name(layer), dtype=ir.DataType.FLOAT, shape=axes)
        graph.inputs.append(limit)
        if router.gathering is not None:
            minus_one = shared_constant(graph, "threshold.minus_one", np.full((1, 1), -1, np.float32))
            _replace_inputs(graph, router.gathering, {0: limit, 1: minus_one})
        else:
            compare = router.active.producer() if router.active is not None else None
            assert compare is not None, "a tagged node decides"
            _replace_inputs(graph, compare, {1: limit})


def _replace_inputs(graph: ir.Graph, node: ir.Node, by: dict[int, ir.Value]) -> None:
    for place, value in by.items():
        old = node.inputs[place]
        node.replace_input_with(place, value)
        if old is not None and old.name is not None and old.is_initializer() and not old.uses():
            graph.initializers.pop(old.name)
