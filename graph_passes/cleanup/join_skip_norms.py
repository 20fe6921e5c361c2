"""Fuse residual additions with the norms behind them again, where they came apart for the passes on layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.cleanup.norms_around_rows import move_norms_off_rows
from dlo_export.graph_passes.cleanup.norms_in_branches import add_behind_branches, join_in_branches
from dlo_export.graph_passes.cleanup.skip_norms import (
    NORM,
    SUM,
    ZEROS,
    fused_node,
    fused_norm,
    is_norm,
    is_residual_addition,
    only_norm_of,
)
from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.find.data_flow import constant_tensor, is_op
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import MICROSOFT
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

    ONNX Runtime fuses neither of the two norms by itself, and the fused operator rounds in its own way. Around a block
    that an If skips, the fused operators move into its branches (`norms_in_branches.py`), around one that runs on rows,
    rows are gathered behind the one and put back in front of the other (`norms_around_rows.py`); in the masked form
    they stand where they were. So all forms, all tokens active, compute what the graph computed before it was routed,
    bit for bit.

    Optional, and only in a graph that had such nodes, unless every norm is asked for: there the additions of injected
    layers are fused too. Layers are not found in the graph any more, before it is split again. Scope: main graph.

    ONNX Runtime's CUDA provider runs the fused operator in 40 % of the time that it takes for the norm alone (a row of
    4096, measured on an H200). So with `every`, a norm of the stream that stands behind no addition is fused with one
    of zeros, which are made once in a step; norms of heads, and of what blocks add, stay as they are::

        zeros      = ConstantOfShape(Shape(x))
        n, _, _, _ = com.microsoft.SkipSimplifiedLayerNormalization <epsilon> (x, zeros, weight)

    Attributes:
        around_routed: Fuse norms in front of and behind routed blocks too.
        every: Fuse in a graph that had no such nodes as well, and every norm.
    """

    around_routed: bool = False
    every: bool = False

    nodes_from: ClassVar[Border | None] = "plain"

    def rewrite(self, model: ir.Model) -> bool:
        """Fuse every addition that one norm reads."""
        if not self.every and SplitSkipNormsPass.__name__ not in {run.name for run in passes_run(model)}:
            return False
        graph, tags = model.graph, {PASS_KEY: self._name}
        streams = _stream_values(graph) if self.every else set()
        masked = [node for node in graph if _adds_masked_branch(node)]
        apart: set[ir.Value | None] = set()
        if not self.around_routed:
            apart = {value for node in masked for value in (*node.inputs, *node.outputs)}
        # First the branches, which take additions and norms from outside, and what rows keep apart; then what is left.
        for node in list(graph) if self.around_routed else ():
            if is_op(node, "If"):
                if not join_in_branches(node, tags):
                    add_behind_branches(node, tags)
            elif node.graph is graph:
                move_norms_off_rows(node, tags)
        for node in list(graph):
            if not is_residual_addition(node) or node.outputs[0] in apart:
                continue
            if (norm := only_norm_of(node.outputs[0], graph)) is not None:
                _join(graph, node, norm, tags)
        if self.every:
            graph.opset_imports[MICROSOFT] = 1
            _join_with_zeros(graph, streams, tags)
        forget_run(model, SplitSkipNormsPass.__name__)
        return True

    @classmethod
    def of(cls, model: ir.Model) -> JoinSkipNormsPass | None:
        """The pass as it ran on a model; None where it did not."""
        settings = [run.settings for run in passes_run(model) if run.name == cls.__name__]
        return cls(**settings[-1]) if settings else None


def _adds_masked_branch(node: ir.Node) -> bool:
    if not is_op(node, "Add"):
        return False
    sources = [value.producer() for value in node.inputs if value is not None]
    masks = [source for source in sources if is_op(source, "Where")]
    return any(mask.metadata_props.get(PASS_KEY) == RouteLayersPass.__name__ for mask in masks)


def _join(graph: ir.Graph, add: ir.Node, norm: ir.Node, tags: dict[str, str]) -> None:
    fused = fused_node(add, norm, tags)
    # In the addition's place, since others may read the sum before the norm does.
    graph.insert_before(add, fused)
    replace_value(norm.outputs[0], fused.outputs[NORM])
    replace_value(add.outputs[0], fused.outputs[SUM])
    graph.remove([norm, add], safe=True)


def _stream_values(graph: ir.Graph) -> set[ir.Value]:
    """The residual stream [batch, sequence, hidden] in front of every block, and behind the last one."""
    layers = find_decoder_layers(graph)
    blocks = [block for layer in layers for block in (layer.attention, layer.mlp)]
    return {*(block.stream_in for block in blocks), blocks[-1].stream_out}


def _join_with_zeros(graph: ir.Graph, streams: Collection[ir.Value], tags: dict[str, str]) -> None:
    """Fuses what norms of the stream there are left."""
    norms = [(node, node.inputs[0]) for node in graph if is_norm(node) and constant_tensor(node.inputs[1]) is not None]
    alone = [(node, value) for node, value in norms if value is not None and value in streams]
    if not alone:
        return
    first, stream = alone[0]
    dtype = stream.dtype
    assert dtype is not None, "the pipeline types what it makes"
    zero = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
    shape = ir.node("Shape", [stream], metadata_props=dict(tags), name="model.zeros.shape")
    filled = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": zero}, name=ZEROS, metadata_props=dict(tags))
    shape.outputs[0].name, shape.outputs[0].dtype = "model.zeros.shape", ir.DataType.INT64
    zeros = filled.outputs[0]
    zeros.name, zeros.dtype, zeros.shape = ZEROS, dtype, stream.shape
    graph.insert_before(first, [shape, filled])
    for norm, _ in alone:
        fused = fused_norm(norm, zeros, tags)
        graph.insert_before(norm, fused)
        replace_value(norm.outputs[0], fused.outputs[NORM])
        graph.remove(norm, safe=True)
