"""What a step costs where everything that may be skipped is: the ideal that routing can reach."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.interface import present_active_name
from dlo_export.graph_passes.cleanup.remove_unused import RemoveUnusedPass
from dlo_export.graph_passes.rewriting import replace_value


def everything_skipped(lowered: Path, name: str) -> Path:
    """Writes beside a graph what is left of it when every token skips every routed block, and nobody asks a router.

    Keys and values of tokens that leave them, and the appending of zeros to the cache of those that do not, are left:
    the former is work that must be done, the latter what the graph's interface asks for.

    Args:
        lowered: Routed, with `--lowering if`: the branches say what is left.
        name: Of the new graph, which shares the weights.
    """
    model = ir.load(lowered)
    graph = model.graph
    for conditional in [node for node in graph if node.op_type == "If"]:
        _inline(graph, conditional)
    # Who was active is nobody's state any more. With it and the branches go routers and the weights of what is skipped.
    graph.outputs[:] = [value for value in graph.outputs if not (value.name or "").startswith(present_active_name(""))]
    RemoveUnusedPass()(model)
    path = lowered.with_name(f"{name}.onnx")
    ir.save(model, path)
    return path


def _inline(graph: ir.Graph, conditional: ir.Node) -> None:
    """Puts the branch of skipped steps in the place of its If; the other one goes, with what it reads."""
    active, skipping = (conditional.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    active.outputs.clear()
    active.remove(list(active), safe=True)
    computed, nodes = list(skipping.outputs), list(skipping)
    skipping.outputs.clear()
    skipping.remove(nodes)
    graph.insert_before(conditional, nodes)
    for result, value in zip(conditional.outputs, computed, strict=True):
        replace_value(result, value)
    graph.remove(conditional, safe=True)
