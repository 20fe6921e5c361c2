"""Routers whose thresholds are graph inputs: a benchmark decides who is active, and routing costs what it costs."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.routers import find_routers

SKIPPED, ACTIVE = 3e38, -3e38  # thresholds above and below every score and every logit


def threshold_name(layer: int | str) -> str:
    """Graph input float32 [batch, sequence], or [batch, sequence, 1]: what an active token of the layer exceeds."""
    return f"threshold.{layer}"


def thresholds_as_inputs(model: ir.Model) -> None:
    """Lets every router compare its scores or logits with an input of their axes, which is SKIPPED or ACTIVE."""
    graph = model.graph
    for layer, router in find_routers(graph).items():
        assert router.active is not None, "a router decides"
        compare = router.active.producer()
        assert compare is not None, "a tagged node decides"
        old = compare.inputs[1]
        column = [] if router.logits is None else [1]
        limit = ir.val(threshold_name(layer), dtype=ir.DataType.FLOAT, shape=["batch", "sequence", *column])
        graph.inputs.append(limit)
        compare.replace_input_with(1, limit)
        if old is not None and old.name is not None and not old.uses():
            graph.initializers.pop(old.name, None)
