"""Make routed layers skip: run their branches on the rows of active tokens only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import onnx_ir as ir

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank
from dlo_export.graph_passes.lowerings.attention_in_branch import branch_problems, close_in_branch
from dlo_export.graph_passes.lowerings.attention_on_rows import projections_on_rows, row_problems, run_on_active_rows
from dlo_export.graph_passes.lowerings.compacted_rows import CompactedRows, pass_rows_on
from dlo_export.graph_passes.lowerings.lower_skip_to_if import any_active
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.lowerings.mlp_in_branch import dequantised_outside
from dlo_export.graph_passes.lowerings.mlp_on_rows import run_mlp_on_rows
from dlo_export.graph_passes.lowerings.record import ROWS_READ_BACK, LoweringRecord
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.layer_checks import eager_branches


@dataclasses.dataclass(frozen=True)
class LowerSkipToCompactionPass(LoweringPass):
    """Gather the active tokens, run norm and MLP on them, and put the sums in their places.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After (n tokens are active; n may be 0)::

        idx  = Transpose(NonZero(active))                    # int64 [n, 2]
        rows = GatherND(h, idx)                              # [n, hidden]
        d    = MLP(RMSNormalization(rows))                   # the same nodes, on rows
        kept = Mul(Unsqueeze(GatherND(scale, idx), -1), d)
        y    = ScatterND(h, idx, Add(rows, kept))            # indices are unique; a skipped token keeps h

    Where attention is masked too (`RouteLayersPass`, kind "layer"), its projections run on rows; attention itself stays
    [batch, sequence] under its mask, with zeros for skipped tokens::

        n    = RMSNormalization(GatherND(x, idx))            # the same nodes, on rows
        q    = RotaryEmbedding(ScatterND(zeros, idx, n·Wq))  # k and v likewise: the zeros that Where wrote before
        a    = Attention(q, k, v, bias, past_key, past_value)
        h    = ScatterND(x, idx, Add(GatherND(x, idx), GatherND(a, idx)·Wo))

    Where the MLP stands behind it in one branch, it reads the sums as they are, and rows are put in their places once,
    behind both (`pass_rows_on`).

    Where attention alone is skipped and skipped tokens leave keys and values, the query's projection runs on rows of
    the norm's output, and keys and values come from all of it. Attention in another form than the Attention node's
    stays where it is, for all tokens: what runs on rows is the output's projection, and the query's where that is a
    product of its own. There no rows of the stream are gathered: ScatterND adds to them by itself, in float32.

    Rows are [1, n, hidden] instead where a node of the MLP counts its axes from the front.

    An MLP of no rows takes little time; attention for which no token is active does. With `branches`, attention on rows
    stands in an If, whose other branch passes x on and appends to the cache what skipped tokens leave
    (`LowerSkipToIfPass`); where whole layers are skipped, so does the MLP, in the same one, since each If costs more
    than several small nodes. An MLP that is skipped alone stays in the main graph, where tools that quantise graphs
    find it, and so does one whose weights are dequantised by nodes of their own.

    Scope: every routed decoder layer of the main graph. Source: ONNX ScatterND-11 and -16, GatherND-12, If-1.

    Attributes:
        branches: Leave out what rows do not make cheap, in steps in which nobody is active.
    """

    branches: bool = True

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Nodes of the branch that do not compute each token by itself."""
        return row_rank(masked.nodes)[1]

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """Projections that do not compute each token by itself; with branches, sizes that the graph does not say."""
        return [*row_problems(masked), *(branch_problems(masked) if self._in_branch(masked) else ())]

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Run the MLP of one layer on its active tokens."""
        run_mlp_on_rows(graph, masked, CompactedRows(graph, masked, self._name, masked.nodes[0]))

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Run the projections of one layer's attention on its active tokens."""
        first = (*projections_on_rows(masked), *masked.outputs)[0]
        access = CompactedRows(graph, masked, self._name, first, own=self._in_branch(masked))
        run_on_active_rows(masked, access)
        if self._in_branch(masked):
            self._close_in_branch(graph, masked, access)

    def lower_layer(self, graph: ir.Graph, attention: MaskedAttention, mlp: MaskedMlp) -> None:
        """Run both blocks of a layer that is skipped whole on the same rows, with branches in one of them."""
        block = mlp.layer.mlp
        if not self.branches or dequantised_outside(mlp) is not None or block.stream_operand is not block.stream_in:
            super().lower_layer(graph, attention, mlp)
            return
        access = CompactedRows(graph, attention, self._name, projections_on_rows(attention)[0], own=True)
        rows = CompactedRows(graph, mlp, self._name, mlp.nodes[0], like=access)
        run_mlp_on_rows(graph, mlp, rows)
        run_on_active_rows(attention, access)
        pass_rows_on(access, rows)
        behind = [*(node for node in mlp.nodes if node.graph is graph), *rows.nodes]
        self._close_in_branch(graph, attention, access, behind)

    def _close_in_branch(
        self, graph: ir.Graph, masked: MaskedAttention, access: CompactedRows, behind: Sequence[ir.Node] = ()
    ) -> None:
        """Puts attention on rows into a branch, with what is behind it in the layer."""
        # What is left of the masked form, and what rows need besides.
        nodes = [*(node for node in masked.nodes if node.graph is graph), *access.nodes]
        close_in_branch(graph, masked, self._any_active(graph, masked), self._name, nodes, behind)

    def _in_branch(self, masked: MaskedAttention) -> bool:
        """Whether an If leaves out attention itself; projections of no rows need none."""
        return self.branches and not masked.stays

    def _any_active(self, graph: ir.Graph, masked: MaskedBlock) -> ir.Value:
        decision = masked.active.producer()
        assert decision is not None, "a router decides"
        return any_active(graph, masked, decision, self._name, reduce_bool=True)  # branches are for ONNX Runtime alone


RECORD = LoweringRecord(
    name="compact",
    targets=("onnxruntime-cpu",),
    make_pass=lambda workload: LowerSkipToCompactionPass(),
    stage=lowered_stage(LowerSkipToCompactionPass.__name__, eager_branches),
    skips="tokens",
    not_capturable=ROWS_READ_BACK,
    reason="compaction skips work in prefill, batches and decode alike, in standard operators",
    suits=lambda workload: True,
    routing=get_args(RoutingKind),
    fuses_norms=True,
)
