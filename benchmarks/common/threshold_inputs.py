"""Routers whose thresholds are graph inputs: a benchmark decides who is active, and routing costs what it costs."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.spec.provenance import ROUTER_ACTIVE, role_values

SKIPPED, ACTIVE = 2.0, -1.0  # thresholds above and below every score


def threshold_name(layer: int | str) -> str:
    """Graph input float32 [batch, sequence]: the score that an active token of the layer exceeds."""
    return f"threshold.{layer}"


def thresholds_as_inputs(model: ir.Model) -> None:
    """Lets every router compare its scores with an input: what is above 1 skips all tokens, what is below 0 none."""
    graph = model.graph
    for layer, active in sorted(role_values(graph, ROUTER_ACTIVE).items()):
        compare = active.producer()
        assert compare is not None, "a tagged node decides"
        old = compare.inputs[1]
        limit = ir.val(threshold_name(layer), dtype=ir.DataType.FLOAT, shape=["batch", "sequence"])
        graph.inputs.append(limit)
        compare.replace_input_with(1, limit)
        if old is not None and old.name is not None and not old.uses():
            graph.initializers.pop(old.name, None)
