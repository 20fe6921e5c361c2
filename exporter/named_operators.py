"""Operators of a graph that a runtime may have no kernels for: what providers lack, and what plugins compute."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.projections import HEAD_NORM_INPUTS
from dlo_export.graph_passes.spec.ops import DOMAIN
from dlo_export.graph_passes.weights.storage import Place
from dlo_export.runtimes.onnxruntime.providers import NORMING_ATTENTION


def named_operators(model: ir.Model) -> set[str]:
    """What of a graph providers' gaps may name: operators with their `reduction`, and those of other domains."""
    nodes = list(model.graph.all_nodes())
    norming = {
        NORMING_ATTENTION
        for node in nodes
        for index in HEAD_NORM_INPUTS.get((node.domain, node.op_type), {}).values()
        if Place(node, index).value is not None
    }
    reductions = {
        f"{node.op_type}({node.attributes['reduction'].as_string()})"
        for node in nodes
        if "reduction" in node.attributes
    }
    return norming | reductions | {f"{node.domain}::{node.op_type}" for node in nodes if node.domain}


def plugin_operators(model: ir.Model) -> tuple[str, ...]:
    """Operators of a graph that only the plugins compute, such as "dlo::SkipDown"."""
    return tuple(sorted({f"{DOMAIN}::{node.op_type}" for node in model.graph.all_nodes() if node.domain == DOMAIN}))
