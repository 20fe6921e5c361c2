"""One router for all layers: what is left of what routing costs are the branches."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.rewriting import remove_unused


def ask_first_router(model: ir.Model) -> None:
    """Has every If ask the first one's router; the others' go, unless their scores scale what a branch computes.

    Args:
        model: With `--lowering if`, its layers alike in what they decide; changed in place.
    """
    conditionals = [node for node in model.graph if node.op_type == "If"]
    first, *others = [value for node in conditionals for value in node.inputs if value is not None]
    for condition in others:
        # Inside the branches the tokens are masked by what the condition was reduced from.
        for value, by in ((condition, first), (reduced_by(condition), reduced_by(first))):
            value.replace_all_uses_with(by)
    remove_unused(model.graph)


def reduced_by(condition: ir.Value) -> ir.Value:
    """Which tokens are active, of whether any is."""
    node = condition.producer()
    assert node is not None
    assert node.op_type == "ReduceMax"
    assert node.inputs[0] is not None
    return node.inputs[0]
