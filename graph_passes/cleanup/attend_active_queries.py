"""Run attention on active tokens' queries, and on the keys they see, where a step is long enough for that to pay."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.branches import Branch
from dlo_export.graph_passes.cleanup.active_queries import ActiveQueries, SkippedKeys
from dlo_export.graph_passes.cleanup.long_steps import (
    LEAST,
    AttendedRows,
    LongStep,
    attended_rows,
    choose_in_long_steps,
)
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass

_INPUTS, _OUTPUTS = 6, 3  # of an Attention node that keeps its own cache


@dataclasses.dataclass(frozen=True)
class AttendActiveQueriesPass(GraphPass):
    """Give attention in a branch of compaction's If the queries of active tokens, and keys they see, in long steps.

    Before::

        bias         = Where(Unsqueeze(present_active), mask, lowest)    # where skipped tokens leave no keys
        a, pk, pv    = Attention(q, k, v, bias, past_key, past_value)    # q [batch, sequence, …]
        rows         = GatherND(a, idx)                                  # [n, …], of active tokens

    After::

        rows, pk, pv = If(sequence >= least) <
          then_branch = {
            m            = ReduceMax(ReduceSum<axes=1>(active))          # most active tokens of a sequence
            rows, pk, pv = If(m < sequence) <
              then_branch = {
                flag, at   = TopK<axis=1>(active, m)                     # [batch, m]: active ones first, in order
                q'         = GatherND<batch_dims=1>(q, at)
                mask'      = GatherND<batch_dims=1>(mask, at)
                (a, pk, pv as below)
                rows       = GatherND(a, Transpose(NonZero(flag)))       # of a sequence with fewer, those it has
              }, else_branch = { as before }
            >
          }, else_branch = { as before }
        >

    where skipped tokens leave their keys::

        a, pk, pv  = Attention(q', k, v, mask', past_key, past_value)

    and where they leave none, so that nobody need look at their slots::

        seen, slot = TopK<axis=1>(present_active, s)                     # s: most active tokens behind a sequence
        pk, pv     = Concat(past_key, k), Concat(past_value, v)
        bias'      = Min(GatherElements<axis=2>(mask', slot), Where(seen, highest, lowest))
        a          = Attention(q', GatherND<batch_dims=2>(pk, slot), GatherND<batch_dims=2>(pv, slot), bias')

    What attention computes for skipped tokens nobody reads, and it takes the longer the more tokens are seen. A short
    step, such as decode's, would pay more for choosing than it saves, and so would one in which a sequence skips
    nothing. A padded token, which sees nobody, gets the mean of fewer values than without this pass. Attention has no
    weights, so it may stand in several branches. Optional: attention that is causal by itself, or is given heads apart,
    is left alone. The mask must be [batch, 1, sequence, total], as that of our plain graph. Scope: branches of the main
    graph's Ifs. Source: ONNX Attention-23, GatherND-12, TopK-11.

    Attributes:
        least: Tokens of a sequence in a step that is long.
    """

    least: int = LEAST

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (LoweringPass, ScatterPackedRowsPass)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every attention whose result only active tokens read."""
        graph = model.graph
        found = attended_rows(graph, _is_plain)
        for rows in found:
            skipped = self.skipped_keys(rows)
            some = partial(self._some_queries, graph, rows, skipped)
            told = [] if skipped is None else [skipped.node]
            choose_in_long_steps(graph, rows, some, told=told, least=self.least, made_by=self._name)
        if found:
            graph.sort()
        return bool(found)

    def skipped_keys(self, rows: AttendedRows) -> SkippedKeys | None:
        """Which keys an attention is not given in long steps; None where it is given all.

        Args:
            rows: What attends.
        """
        return SkippedKeys.of(rows)

    def _some_queries(self, graph: ir.Graph, rows: AttendedRows, skipped: SkippedKeys | None, step: LongStep) -> Branch:
        """Attends from active queries alone; gives their rows in the order of the index, and the cache."""
        return ActiveQueries(graph, rows, self._name, step).branch(skipped)


def _is_plain(attention: ir.Node) -> bool:
    """Whether it is an Attention whose mask says everything, and whose queries are [batch, sequence, …]."""
    if not is_op(attention, "Attention"):
        return False
    attributes, inputs = attention.attributes, attention.inputs
    if attributes.get_int("is_causal", 0) or not attributes.get_int("q_num_heads", 0):
        return False
    return len(inputs) == _INPUTS and all(value is not None for value in inputs) and len(attention.outputs) == _OUTPUTS
