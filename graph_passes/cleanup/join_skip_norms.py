"""Fuse residual additions with the norms behind them again, where they came apart for the passes on layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.split_skip_norms import FUSED, SplitSkipNormsPass
from dlo_export.graph_passes.find.data_flow import constant_tensor, is_op
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass, forget_run, passes_run
from dlo_export.graph_passes.spec.provenance import PASS_KEY


@dataclasses.dataclass(frozen=True)
class JoinSkipNormsPass(GraphPass):
    """Undo `SplitSkipNormsPass`, so that what nothing was done to is what it was, and runs as fast.

    Before::

        s = Add(x, branch)
        n = RMSNormalization <axis=-1> (s, weight)  # or SimplifiedLayerNormalization

    After::

        n, _, _, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon> (x, branch, weight)

    ONNX Runtime fuses neither of the two norms by itself. Optional, and only in a graph that had such nodes: there the
    additions of injected layers are fused too. Around a routed branch the norms stay by themselves in the masked form
    as in every other one, because the fused operator rounds in its own way. Layers are not found in the graph any
    more, before it is split again. Scope: main graph.
    """

    nodes_from: ClassVar[Border | None] = "plain"

    def rewrite(self, model: ir.Model) -> bool:
        """Fuse every addition that one norm reads."""
        if SplitSkipNormsPass.__name__ not in {run.name for run in passes_run(model)}:
            return False
        nodes = list(model.graph)
        routed = {value for node in nodes if _adds_masked_branch(node) for value in (*node.inputs, *node.outputs)}
        for norm in nodes:
            if is_op(norm, "RMSNormalization", "SimplifiedLayerNormalization") and norm.inputs[0] not in routed:
                _join(model.graph, norm)
        forget_run(model, SplitSkipNormsPass.__name__)
        return True


def _adds_masked_branch(node: ir.Node) -> bool:
    if not is_op(node, "Add"):
        return False
    sources = [value.producer() for value in node.inputs if value is not None]
    masks = [source for source in sources if source is not None and is_op(source, "Where")]
    return any(mask.metadata_props.get(PASS_KEY) == RouteLayersPass.__name__ for mask in masks)


def _join(graph: ir.Graph, norm: ir.Node) -> None:
    total, weight = norm.inputs[:2]
    add = None if total is None else total.producer()
    if total is None or add is None or add.graph is not graph or not is_op(add, "Add"):
        return
    # The addition of a bias is no residual one; a second norm of the same sum would need a second node.
    norms = [node for node in total.consumers() if node.op_type == norm.op_type]
    is_residual = all(value is not None and constant_tensor(value) is None for value in add.inputs)
    if not is_residual or len(norms) != 1 or constant_tensor(weight) is None:
        return
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    fused = ir.node(
        FUSED,
        [*add.inputs, weight],
        {"epsilon": epsilon},
        domain="com.microsoft",
        num_outputs=4,
        name=(norm.name or FUSED).removesuffix("/norm"),
        metadata_props={PASS_KEY: JoinSkipNormsPass.__name__},
    )
    # In the addition's place, since others may read the sum before the norm does. Nobody reads outputs 1 and 2.
    for output, old in ((fused.outputs[0], norm.outputs[0]), (fused.outputs[3], total)):
        output.type, output.shape = old.type, old.shape
    for output in fused.outputs[1:3]:
        output.name = ""
    graph.insert_before(add, fused)
    replace_value(norm.outputs[0], fused.outputs[0])
    replace_value(total, fused.outputs[3])
    graph.remove([norm, add], safe=True)
