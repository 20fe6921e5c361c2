"""Make routed layers skip: run a block only in steps where some token is active."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import get_args

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import layer_tensor_name, router_path
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import element_type, is_op, node_order
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.masked_branch import own_columns
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.lowerings.attention_in_branch import branch_problems, move_into_branch
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.lowerings.projections_in_branches import (
    move_projections_into_branches,
    projection_problems,
)
from dlo_export.graph_passes.lowerings.record import ONNXRUNTIME, LoweringRecord
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec import graph_checks
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.provenance import Dims, TaggedNodes, shared_node


@dataclasses.dataclass(frozen=True)
class LowerSkipToIfPass(LoweringPass):
    """Move the masked MLP block of each routed layer into an If that runs it when any token is active.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After::

        any = Cast<BOOL>(ReduceMax<keepdims=0>(Cast<FLOAT>(active)))     # 0-D
        y   = If(any) <
          then_branch = {                                                # the same nodes, all of them
            d       = MLP(RMSNormalization(h))
            masked  = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
            added   = Add(h, masked)
          } => (added)
          else_branch = {
            skipped = Identity(h)
          } => (skipped)

    Where attention is masked too (`RouteLayersPass`, kind "layer"), it moves into an If of its own, with its cache::

        h, pk, pv = If(any) <
          then_branch = {                                                # the same nodes, all of them
            a, pk, pv = Attention(q, Where(…, k, 0), Where(…, v, 0), Where(…, bias, lowest), past_key, past_value)
            h         = Add(x, Where(Unsqueeze(active, -1), a·Wo, 0))
          } => (h, pk, pv)
          else_branch = {
            h         = Identity(x)
            pk        = Concat(past_key, zeros)                          # what a skipped token leaves; pv likewise
          } => (h, pk, pv)

    Where attention alone is skipped and skipped tokens leave keys and values, norm, keys and values stay in front of
    the If, and the else branch appends them::

            pk        = Concat(past_key, Transpose(Reshape(k)))

    Over a cache of fixed size (`UseStaticCachePass`), attention and the writing of the cache stay outside, since
    TensorRT builds neither inside an If; the projections in front of them are in one If, zeros in its other branch, and
    those behind them in another, which closes the block::

        q, k, v   = If(any) <then_branch = { RMSNormalization, MatMul, … }, else_branch = { Identity(zeros) }>
        pk        = TensorScatter(past_key, heads(k), write_indices)
        a         = Attention(heads(q), pk, pv, bias)
        h         = If(any) <then_branch = { Add(x, Where(…, a·Wo, 0)) }, else_branch = { Identity(x) }>

    A step skips a layer only where none of its tokens is active: with a share p of tokens skipping, p to the power of
    batch·sequence. So it pays for single-token decode at batch 1, and in prefill and batches it saves nothing.

    What the branch needs of TensorRT and ONNX Runtime: weights stay initializers of the main graph (subgraph
    initializers cost several times their memory at load); no node that depends on h and serves the MLP stays outside
    (TensorRT runs lazily only what hangs on the conditional's inputs); each branch produces its output itself (so no
    pass may eliminate Identity nodes afterwards), of equal rank and type and under a name of its own. The router and
    its scale, the state of activity and what prepares constants (runtimes fold it) stay outside. The condition goes
    through fp32 because TensorRT reduces numbers only, and ONNX reduces bool from opset 20 on only.

    Scope: every routed decoder layer of the main graph. Source: ONNX If-1, ReduceMax-1; TensorRT IIfConditional.
    """

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Weights that a node dequantises: outside of the branch it runs in every step, inside ONNX Runtime fails.

        ONNX Runtime 1.32 fuses such a node with the MatMul that reads it, and refuses to load a graph where the weight
        is not an initializer of the subgraph they stand in.
        """
        sources = [value.producer() for node in masked.nodes for value in node.inputs if value is not None]
        outside = [source for source in sources if source is not None and source not in masked.nodes]
        found = [source for source in outside if is_op(source, "DequantizeLinear")]
        return [f"{place(found[0])} dequantises a weight, which no branch can leave out"] if found else []

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Move the block of one layer into an If."""
        index, block = masked.layer.index, masked.layer.mlp
        mlp, output, dtype = layer_tensor_name(index, "mlp"), block.stream_out, element_type(block.stream_operand)
        shape = (*masked.layer.token_dims, masked.layer.hidden_size)
        tags = TaggedNodes(type(self).__name__, index).tags
        condition = _any_active(graph, masked, block.add, tags)

        # Both branches: what is moved keeps its order, and ends in an addition of the branch's own, which closes the
        # block; else the stream passes through.
        order = node_order(graph)
        serving = {*masked.nodes, masked.select}
        moved = sorted({*serving, *own_columns(serving, (masked.select, masked.scaling))}, key=order.__getitem__)
        operands = [value for value in block.add.inputs if value is not None]
        add = TaggedNodes(type(self).__name__, index)
        added = add.add(
            "Add",
            *operands,
            name=f"{mlp}.active_output",
            dtype=dtype,
            shape=shape,
            closes=operands.index(block.branch),
        )
        keep = TaggedNodes(type(self).__name__, index)
        skipped = _add_skip(keep, masked, shape)
        graph.remove(moved)
        conditional = ir.node(
            "If",
            [condition],
            {
                "then_branch": ir.Graph([], [added], nodes=[*moved, *add.nodes], name=f"{mlp}.then_branch"),
                "else_branch": ir.Graph([], [skipped], nodes=keep.nodes, name=f"{mlp}.else_branch"),
            },
            name=f"{mlp}.if",
            metadata_props=dict(tags),
        )

        # The If stands where the addition stood, and gives the stream under its name.
        graph.insert_before(block.add, conditional)
        result = conditional.outputs[0]
        result.type, result.shape = added.type, ir.Shape(shape)
        replace_value(output, result)
        graph.remove(block.add, safe=True)

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """A cast between stream and sum, or sizes that the graph does not say."""
        return projection_problems(masked) if masked.is_static else branch_problems(masked)

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Move the attention of one layer into an If, or the projections around it where it must stay outside."""
        tags = TaggedNodes(type(self).__name__, masked.layer.index).tags
        condition = _any_active(graph, masked, masked.layer.attention.add, tags)
        move = move_projections_into_branches if masked.is_static else move_into_branch
        move(graph, masked, condition, type(self).__name__)


def _any_active(graph: ir.Graph, masked: MaskedBlock, before: ir.Node, tags: Mapping[str, str]) -> ir.Value:
    """Whether any token is active: bool, 0-D; once per layer, whatever of it is routed."""
    router, float32, boolean = router_path(masked.layer.index), ir.DataType.FLOAT, ir.DataType.BOOL
    steps: tuple[tuple[str, str, ir.DataType, Dims | None, dict[str, int]], ...] = (
        ("Cast", "active_number", float32, masked.active.shape, {"to": int(float32)}),
        ("ReduceMax", "any_number", float32, (), {"keepdims": 0}),
        ("Cast", "any_active", boolean, (), {"to": int(boolean)}),
    )
    value = masked.active
    for op_type, name, dtype, shape, attributes in steps:
        value = shared_node(
            graph,
            op_type,
            value,
            name=f"{router}.{name}",
            tags=tags,
            dtype=dtype,
            shape=shape,
            before=before,
            **attributes,
        )
    return value


def _add_skip(nodes: TaggedNodes, masked: MaskedMlp, shape: Dims) -> ir.Value:
    """The stream as the addition reads it, for steps without an active token: h, cast where the operand is."""
    # The addition may read a cast of the stream: both branches must give the same type, so the cast is repeated here.
    block = masked.layer.mlp
    casts: list[ir.Node] = []
    value = block.stream_operand
    while value is not block.stream_in:
        node = value.producer()
        assert node is not None, "the operand is the stream behind Cast and Identity"
        assert node.inputs[0] is not None, "Cast and Identity have an input"
        if is_op(node, "Cast"):
            casts.append(node)
        value = node.inputs[0]
    for cast in reversed(casts):
        source, to = cast.outputs[0], cast.attributes["to"].as_int()
        name = f"{source.name}.skipped"
        value = nodes.add("Cast", value, name=name, dtype=ir.DataType(to), shape=shape, to=to)
    name = layer_tensor_name(masked.layer.index, "mlp.skipped_output")
    return nodes.add("Identity", value, name=name, dtype=element_type(block.stream_operand), shape=shape)


RECORD = LoweringRecord(
    name="if",
    targets=ONNXRUNTIME,
    make_pass=lambda workload: LowerSkipToIfPass(),
    stage=lowered_stage(LowerSkipToIfPass.__name__, graph_checks.eager_branches),
    skips="steps",
    not_capturable="the host decides which branch runs",
    reason="decode of one sequence: a skipped layer runs nothing, in native operators",
    suits=lambda workload: workload.phase == "decode" and workload.max_batch == 1,
    routing=get_args(RoutingKind),
)
