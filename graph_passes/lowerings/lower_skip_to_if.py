"""Make routed layers skip: run a block only in steps where some token is active."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import router_path
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import node_order
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.masked_branch import own_columns
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.lowerings.attention_in_branch import branch_problems, move_into_branch
from dlo_export.graph_passes.lowerings.branch_addition import renew_addition
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.lowerings.mlp_in_branch import add_skip, close_mlp_in_branch, dequantised_outside
from dlo_export.graph_passes.lowerings.projections_in_branches import (
    move_projections_into_branches,
    projection_problems,
)
from dlo_export.graph_passes.lowerings.record import LoweringRecord
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.layer_checks import eager_branches
from dlo_export.graph_passes.spec.provenance import Dims, TaggedNodes, shared_node

_REDUCES_BOOL = 20  # the first opset whose ReduceMax does


@dataclasses.dataclass(frozen=True)
class LowerSkipToIfPass(LoweringPass):
    """Move the masked MLP block of each routed layer into an If that runs it when any token is active.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After::

        any = ReduceMax<keepdims=0>(active)                              # 0-D
        y   = If(any) <
          then_branch = {                                                # the same nodes, all of them
            d       = MLP(RMSNormalization(h))
            masked  = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
            added   = Add(h, masked)
          } => (added)
          else_branch = {
            skipped = Identity(h)
          } => (skipped)

    Where attention is masked too (`RouteLayersPass`, kind "layer"), one If holds the layer and its cache::

        y, pk, pv = If(any) <
          then_branch = {                                                # the same nodes, all of them, but for
            n         = Where(Unsqueeze(active, -1), RMSNormalization(x), 0)   # the zeros of k and v (`zero_in_front`)
            a, pk, pv = Attention(n·Wq, n·Wk, n·Wv, Where(…, bias, lowest), past_key, past_value)
            h         = Add(x, Where(Unsqueeze(active, -1), a·Wo, 0))
            y         = Add(h, Where(Unsqueeze(active, -1), MLP(RMSNormalization(h)), 0))
          } => (y, pk, pv)
          else_branch = {
            y         = Identity(x)
            pk        = Concat(past_key, zeros)                          # what a skipped token leaves; pv likewise
          } => (y, pk, pv)

    Where attention alone is skipped, the If ends at h. If skipped tokens leave keys and values, norm, keys and values
    stay in front of it, and the else branch appends them::

            pk        = Concat(past_key, Transpose(Reshape(k)))

    Over a cache of fixed size (`UseStaticCachePass`), attention and the writing of the cache stay outside, since
    TensorRT builds neither inside an If, and so they do in other forms than the Attention node's; the projections in
    front of them are in one If, zeros in its other branch, and those behind them in another, which closes the block::

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
    its scale, the state of activity and what prepares constants (runtimes fold it) stay outside. TensorRT and ONNX
    Runtime's CUDA provider reduce numbers only, and ONNX reduces bool from opset 20 on: elsewhere the condition goes
    through fp32, Cast<BOOL>(ReduceMax<keepdims=0>(Cast<FLOAT>(active))).

    Scope: every routed decoder layer of the main graph. Source: ONNX If-1, ReduceMax-1 and -20; TensorRT
    IIfConditional.

    Attributes:
        reduce_bool: Reduce decisions as they are, where the opset can. Each node of a router costs a decode step about
            as much as an addition of hidden states.
    """

    reduce_bool: bool = False

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Weights that a node dequantises."""
        return _dequantised(masked)

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Move the block of one layer into an If."""
        condition = self._any_active(graph, masked)
        skip = add_skip(masked, self._name)
        close_mlp_in_branch(graph, masked, condition, self._mlp_nodes(graph, masked), skip)

    def _mlp_nodes(self, graph: ir.Graph, masked: MaskedMlp) -> list[ir.Node]:
        """What a branch holds of an MLP, in order: it ends in an addition of the pass's own, which closes the block."""
        order = node_order(graph)
        serving = {*masked.nodes, masked.select}
        moved = sorted({*serving, *own_columns(serving, (masked.select, masked.scaling))}, key=order.__getitem__)
        return [*moved, renew_addition(graph, masked, self._name)]

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """A cast between stream and sum, sizes that the graph does not say, weights that a node dequantises."""
        sizes = projection_problems(masked) if masked.stays else branch_problems(masked)
        return [*sizes, *_dequantised(masked)]

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Move the attention of one layer into an If, or the projections around it where it must stay outside."""
        condition = self._any_active(graph, masked)
        if masked.stays:
            move_projections_into_branches(graph, masked, condition, self._name)
        else:
            move_into_branch(graph, masked, condition, self._name)

    def lower_layer(self, graph: ir.Graph, attention: MaskedAttention, mlp: MaskedMlp) -> None:
        """Move a layer that is skipped whole into one If, but where TensorRT wants attention outside of it."""
        if attention.stays or mlp.layer.mlp.stream_operand is not mlp.layer.mlp.stream_in:
            super().lower_layer(graph, attention, mlp)
            return
        behind = self._mlp_nodes(graph, mlp)
        move_into_branch(graph, attention, self._any_active(graph, attention), self._name, behind)

    def _any_active(self, graph: ir.Graph, masked: MaskedBlock) -> ir.Value:
        return any_active(graph, masked, masked.block.add, self._name, reduce_bool=self.reduce_bool)


def _dequantised(masked: MaskedBlock) -> list[str]:
    node = dequantised_outside(masked)
    return [] if node is None else [f"{place(node)} dequantises a weight, which no branch can leave out"]


def any_active(graph: ir.Graph, masked: MaskedBlock, before: ir.Node, made_by: str, *, reduce_bool: bool) -> ir.Value:
    """Whether any token is active: bool, 0-D; once per layer, whatever of it is routed.

    Args:
        graph: The main graph.
        masked: The block.
        before: The node that the new ones go before.
        made_by: Name of the pass.
        reduce_bool: See `LowerSkipToIfPass`.
    """
    router, float32, boolean = router_path(masked.layer.index), ir.DataType.FLOAT, ir.DataType.BOOL
    steps: tuple[tuple[str, str, ir.DataType, Dims | None, dict[str, int]], ...] = (
        ("Cast", "active_number", float32, masked.active.shape, {"to": int(float32)}),
        ("ReduceMax", "any_number", float32, (), {"keepdims": 0}),
        ("Cast", "any_active", boolean, (), {"to": int(boolean)}),
    )
    if reduce_bool and graph.opset_imports.get("", 0) >= _REDUCES_BOOL:
        steps = (("ReduceMax", "any_active", boolean, (), {"keepdims": 0}),)
    value = masked.active
    for op_type, name, dtype, shape, attributes in steps:
        value = shared_node(
            graph,
            op_type,
            value,
            name=f"{router}.{name}",
            tags=TaggedNodes(made_by, masked.layer.index).tags,
            dtype=dtype,
            shape=shape,
            before=before,
            **attributes,
        )
    return value


RECORD = LoweringRecord(
    name="if",
    targets=("onnxruntime-cpu",),
    make_pass=lambda workload: LowerSkipToIfPass(reduce_bool=True),
    stage=lowered_stage(LowerSkipToIfPass.__name__, eager_branches),
    skips="steps",
    not_capturable="the host decides which branch runs",
    reason="decode of one sequence: a skipped layer runs nothing, in native operators",
    suits=lambda workload: workload.phase == "decode" and workload.max_batch == 1,
    routing=get_args(RoutingKind),
    fuses_norms=True,
    multiplies_by_codes=True,
)
