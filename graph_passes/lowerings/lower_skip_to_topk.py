"""Make routed layers skip on TensorRT: run the MLP branch on the rows of active tokens, chosen by TopK."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, get_args

import onnx_ir as ir

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank
from dlo_export.graph_passes.lowerings import chosen_rows
from dlo_export.graph_passes.lowerings.active_rows import run_on_rows
from dlo_export.graph_passes.lowerings.attention_on_rows import projections_on_rows, row_problems, run_on_active_rows
from dlo_export.graph_passes.lowerings.chosen_rows import ChosenRows
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass, cast_problems
from dlo_export.graph_passes.lowerings.record import LoweringRecord
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class LowerSkipToTopKPass(LoweringPass):
    """Gather the active tokens' rows, run norm and MLP on them, put the sums back: in operators TensorRT builds.

    TensorRT-RTX has no NonZero, and its TopK selects 3840 at most: the tokens of a step are cut into chunks of that
    size, each chosen from by a TopK of its own, whose K is the number of active tokens in the chunk. K must be positive
    (ITopKLayer::setInput), so where no token is active TopK chooses one all the same, and a Slice drops it.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After (one chunk; n tokens are active, n may be 0)::

        flat  = Reshape(h, [-1, hidden])                     # [batch·sequence, hidden]
        flags = Cast(Reshape(active, [-1]))                  # 1 or 0 per token
        n     = ReduceSum(flags)
        _, i1 = TopK(flags, Max(n, 1))
        i     = Slice(i1, 0, n)                              # int64 [n]
        rows  = Gather(flat, i)                              # [n, hidden]
        d     = MLP(RMSNormalization(rows))                  # the same nodes, on rows
        kept  = Mul(Unsqueeze(Gather(Reshape(scale, [-1]), i), -1), d)
        y     = Reshape(ScatterND(flat, Unsqueeze(i, -1), Add(rows, kept)), Shape(h))

    Where attention is masked too, its projections run on the same rows, and go back among zeros; attention itself stays
    [batch, sequence] under its mask.

    Scope: every routed decoder layer of the main graph. Source: ONNX TopK-11, ScatterND-16.

    Attributes:
        max_tokens: batch·sequence at most; decides the number of chunks.
    """

    max_tokens: int
    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, UseStaticCachePass)
    oldest_opset: ClassVar[int] = 16  # ScatterND, and TopK with a K that is computed

    @property
    def chunks(self) -> int:
        """How many TopK each layer has."""
        return max(1, -(-self.max_tokens // chosen_rows.MOST_SELECTED))

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Nodes that do not compute each token by itself in two dimensions, or a cast between stream and sum."""
        rank, problems = row_rank(masked.nodes)
        if rank != 2:
            problems = [*problems, "its MLP counts axes from the front"]
        return [*problems, *cast_problems(masked)]

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """Projections that do not compute each token by itself, or a cast between stream and sum."""
        return [*row_problems(masked), *cast_problems(masked)]

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Run the MLP of one layer on the rows that its TopKs choose."""
        block, nodes = masked.block, masked.nodes
        access = ChosenRows(graph, masked, self._name, self.chunks, nodes[0])
        gather = access.new_nodes()
        rows = access.gather(gather, block.stream_in, masked.layer.hidden_size, f"{masked.path}.rows")
        access.scale(gather)
        run_on_rows(nodes, block.stream_in, rows, (access.count,))
        graph.insert_before(nodes[0], gather.nodes)
        access.add(access.new_nodes(), block.stream_in, rows, masked.kept)

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Run the projections of one layer's attention on the same rows."""
        first = projections_on_rows(masked)[0]
        run_on_active_rows(masked, ChosenRows(graph, masked, self._name, self.chunks, first))


RECORD = LoweringRecord(
    name="compact",
    targets=("tensorrt",),
    make_pass=lambda workload: LowerSkipToTopKPass(workload.max_batch * workload.max_sequence),
    stage=lowered_stage(LowerSkipToTopKPass.__name__),
    skips="tokens",
    not_capturable="its data-dependent shapes are read back by the host",
    reason="native operators, skips token by token in prefill, batches and decode alike",
    suits=lambda workload: True,
    routing=get_args(RoutingKind),
    tensorrt_layers=frozenset({"TOPK", "GATHER", "SCATTER"}),
    tensorrt_start="TOPK",
)
