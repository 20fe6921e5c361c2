"""Undo the fusion of residual additions with the norms behind them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.norms_in_branches import split_in_branches
from dlo_export.graph_passes.cleanup.skip_norms import (
    NORM,
    SUM,
    adds_zeros,
    is_fused,
    new_addition,
    new_bias_addition,
    new_norm,
)
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass, forget_run
from dlo_export.graph_passes.spec.provenance import PASS_KEY


@dataclasses.dataclass(frozen=True)
class SplitSkipNormsPass(GraphPass):
    """Give every residual addition a node of its own, as the passes on decoder layers need it.

    Before::

        n, _, _, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon> (x, branch, weight, bias?)

    After::

        s = Add(x, branch)                          # branch = Add(branch, bias) first where there is a bias
        n = RMSNormalization <axis=-1> (s, weight)  # SimplifiedLayerNormalization before opset 23

    What adds zeros (`JoinSkipNormsPass`) becomes the norm alone.

    Where `JoinSkipNormsPass` has moved norms into the branches of an If, they come out again. Optional: a graph without
    such nodes is left alone. Scope: main graph. Graphs of onnxruntime-genai's builder and of mobius have them. Source:
    ONNX Runtime's contrib operators.
    """

    nodes_from: ClassVar[Border | None] = "plain"

    def rewrite(self, model: ir.Model) -> bool:
        """Split every fused node."""
        graph, tags = model.graph, {PASS_KEY: self._name}
        opset = graph.opset_imports.get("", 0)
        # First the branches: what comes out of them is not fused.
        taken_apart = [node for node in graph if is_op(node, "If") and split_in_branches(node, opset, tags)]
        fused = [node for node in graph if is_fused(node)]
        for node in fused:
            _split(graph, node, opset, tags)
        if fused or taken_apart:
            forget_run(model, "JoinSkipNormsPass")  # the pass that undoes this one, which may run again
        return bool(fused or taken_apart)


def _split(graph: ir.Graph, node: ir.Node, opset: int, tags: dict[str, str]) -> None:
    if adds_zeros(node):
        stream, zeros = node.inputs[:2]
        assert stream is not None, "it has an input"
        assert zeros is not None, "and adds to it"
        norm = new_norm(node, stream, opset, tags)
        graph.insert_before(node, norm)
        replace_value(node.outputs[NORM], norm.outputs[0])
        graph.remove(node, safe=True)
        if not zeros.uses() and (source := zeros.producer()) is not None:
            remove_with_sources(graph, source)
        return
    # The sum becomes a node of its own, which is the stream; the norm reads it. A bias is part of the branch.
    bias = new_bias_addition(node, tags)
    add = new_addition(node, tags)
    if bias is not None:
        add.replace_input_with(1, bias.outputs[0])
    norm = new_norm(node, add.outputs[0], opset, tags)
    graph.insert_before(node, [*([bias] if bias is not None else []), add, norm])
    # Nobody reads outputs 1 and 2, mean and variance.
    for old, new in ((node.outputs[NORM], norm.outputs[0]), *((total, add.outputs[0]) for total in node.outputs[SUM:])):
        replace_value(old, new)
    graph.remove(node, safe=True)
