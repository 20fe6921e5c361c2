"""Run attention on active tokens' queries only, where a step is long enough for that to pay."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.branches import Branch
from dlo_export.graph_passes.cleanup.long_steps import (
    LEAST,
    AttendedRows,
    LongStep,
    attended_rows,
    choose_in_long_steps,
    copies,
)
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_QUERY, _MASK = 0, 3  # inputs of an Attention node
_INPUTS, _OUTPUTS = 6, 3  # of one that keeps its own cache


@dataclasses.dataclass(frozen=True)
class AttendActiveQueriesPass(GraphPass):
    """Give attention in a branch of compaction's If the queries of active tokens, in long steps.

    Before::

        a, pk, pv    = Attention(q, k, v, bias, past_key, past_value)    # q [batch, sequence, …]
        rows         = GatherND(a, idx)                                  # [n, …], of active tokens

    After::

        rows, pk, pv = If(sequence >= least) <
          then_branch = {
            m            = ReduceMax(ReduceSum<axes=1>(active))          # most active tokens of a sequence
            rows, pk, pv = If(m < sequence) <
              then_branch = {
                flag, at  = TopK<axis=1>(active, m)                      # [batch, m]: active ones first, in order
                q'        = GatherND<batch_dims=1>(q, at)
                bias'     = GatherND<batch_dims=1>(bias, at)
                a, pk, pv = Attention(q', k, v, bias', past_key, past_value)
                rows      = GatherND(a, Transpose(NonZero(flag)))        # of a sequence with fewer, those it has
              }, else_branch = { as before }
            >
          }, else_branch = { as before }
        >

    What attention computes for skipped tokens nobody reads, and it takes the longer the more tokens are seen. A short
    step, such as decode's, would pay more for choosing queries than it saves, and so would one in which a sequence
    skips nothing. Attention has no weights, so it may stand in several branches. Optional: attention that is causal by
    itself, or is given heads apart, is left alone. The mask must be [batch, 1, sequence, total], as that of our plain
    graph. Scope: branches of the main graph's Ifs. Source: ONNX Attention-23, GatherND-12, TopK-11.

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
            some = partial(self._some_queries, graph, rows)
            choose_in_long_steps(graph, rows, some, least=self.least, made_by=self._name)
        if found:
            graph.sort()
        return bool(found)

    def _some_queries(self, graph: ir.Graph, rows: AttendedRows, step: LongStep) -> Branch:
        """Attends from active queries alone; gives their rows in the order of the index, and the cache."""
        new, path = TaggedNodes(self._name, rows.layer), rows.path
        query, mask = rows.attention.inputs[_QUERY], rows.attention.inputs[_MASK]
        assert query is not None, "asked by _is_plain"
        assert mask is not None, "asked by _is_plain"
        float32, int64, boolean = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
        first = shared_constant(graph, f"{ROUTERS}.second_axis", np.array([1], np.int64))
        last = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))

        # TopK lists equal numbers in their order: active tokens come first and as they stand, and what fills the other
        # sequences up is not read afterwards.
        asked = (step.flags, step.size)
        top = ir.node("TopK", asked, {"axis": 1}, num_outputs=2, name=f"{path}.top", metadata_props=new.tags)
        chosen, at = top.outputs
        for value, name, dtype in ((chosen, "top", float32), (at, "at", int64)):
            value.name, value.dtype = f"{path}.{name}", dtype
        new.nodes.append(top)
        places = new.add("Unsqueeze", at, last, name=f"{path}.places", dtype=int64, shape=None)

        # Their queries, and their rows of the mask, which is the same for all heads.
        queries = new.add("GatherND", query, places, name=path, dtype=query.dtype, shape=None, batch_dims=1)
        flat = new.add("Squeeze", mask, first, name=f"{path}.mask_rows", dtype=mask.dtype, shape=None)
        told = new.add("GatherND", flat, places, name=f"{path}.mask_chosen", dtype=mask.dtype, shape=None, batch_dims=1)
        bias = new.add("Unsqueeze", told, first, name=f"{path}.mask", dtype=mask.dtype, shape=None)

        # Rows of active tokens, sequence by sequence, as the index has them.
        real = new.add("Cast", chosen, name=f"{path}.real", dtype=boolean, shape=None, to=int(boolean))
        nonzero = new.add("NonZero", real, name=f"{path}.nonzero", dtype=int64, shape=None)
        index = new.add("Transpose", nonzero, name=f"{path}.index", dtype=int64, shape=None, perm=(1, 0))
        attends, gathers = copies((rows.attention, rows.gather), f"{path}.some", new.tags)
        attends.replace_input_with(_QUERY, queries)
        attends.replace_input_with(_MASK, bias)
        attends.outputs[0].shape = None  # of fewer tokens
        gathers.replace_input_with(1, index)
        return [*new.nodes, attends, gathers], [gathers.outputs[0], *attends.outputs[1:]]


def _is_plain(attention: ir.Node) -> bool:
    """Whether it is an Attention whose mask says everything, and whose queries are [batch, sequence, …]."""
    if not is_op(attention, "Attention"):
        return False
    attributes, inputs = attention.attributes, attention.inputs
    if attributes.get_int("is_causal", 0) or not attributes.get_int("q_num_heads", 0):
        return False
    return len(inputs) == _INPUTS and all(value is not None for value in inputs) and len(attention.outputs) == _OUTPUTS
