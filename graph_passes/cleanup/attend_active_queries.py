"""Run attention on active tokens' queries only, where a step is long enough for that to pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS, INPUT_IDS
from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.find.data_flow import is_op, subgraphs_of
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import (
    LAYER_KEY,
    PASS_KEY,
    TaggedNodes,
    shared_constant,
    shared_node,
)

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
            m         = ReduceMax(ReduceSum<axes=1>(active))             # most active tokens of a sequence
            flag, at  = TopK<axis=1>(active, m)                          # [batch, m]: active ones first, in order
            q'        = GatherND<batch_dims=1>(q, at)
            bias'     = GatherND<batch_dims=1>(bias, at)
            a, pk, pv = Attention(q', k, v, bias', past_key, past_value)
            rows      = GatherND(a, Transpose(NonZero(flag)))            # of a sequence with fewer, those it has
          }, else_branch = { as before }
        >

    What attention computes for skipped tokens nobody reads, and it takes the longer the more tokens are seen. A short
    step, such as decode's, would pay more for choosing queries than it saves. Optional: attention that is causal by
    itself, or is given heads apart, is left alone. The mask must be [batch, 1, sequence, total], as that of our plain
    graph. Scope: branches of the main graph's Ifs. Source: ONNX Attention-23, GatherND-12, TopK-11.

    Attributes:
        least: Tokens of a sequence in a step that is long.
    """

    least: int = 128

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (LoweringPass, ScatterPackedRowsPass)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every attention whose result only active tokens read."""
        graph = model.graph
        found = [(holder, each) for holder in graph for each in _attended_rows(graph, holder)]
        for holder, (attention, gather, active) in found:
            self._rewrite(graph, holder, attention, gather, active)
        if found:
            graph.sort()
        return bool(found)

    def _rewrite(self, graph: ir.Graph, holder: ir.Node, attention: ir.Node, gather: ir.Node, active: ir.Value) -> None:
        branch = gather.graph
        assert isinstance(branch, ir.Graph), "a branch of the holder"
        layer = gather.metadata_props.get(LAYER_KEY)
        number = None if layer is None else int(layer)
        results = [gather.outputs[0], *attention.outputs[1:]]
        long = self._rows_of_queries(graph, attention, gather, active, number)
        short = [attention, gather]

        # What the inner If gives out takes the place of rows and cache; the branches' own values get other names.
        given = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in results]
        for old, new in zip(results, given, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name = f"{old.name}.all_queries"
        conditional = ir.node(
            "If",
            [self._is_long(graph, holder)],
            {
                "then_branch": ir.Graph(
                    [],
                    [long.nodes[-1].outputs[0], *_attention_of(long).outputs[1:]],
                    nodes=long.nodes,
                    name=f"{gather.name}.long_step",
                ),
                "else_branch": ir.Graph([], results, nodes=(), name=f"{gather.name}.short_step"),
            },
            outputs=given,
            name=f"{gather.name}.if",
            metadata_props=dict(long.tags),
        )
        branch.insert_before(attention, [conditional])
        branch.remove(short)
        conditional.attributes["else_branch"].as_graph().extend(short)

    def _rows_of_queries(
        self, graph: ir.Graph, attention: ir.Node, gather: ir.Node, active: ir.Value, layer: int | None
    ) -> TaggedNodes:
        """Nodes that attend from active queries alone; the last one gives their rows, in the order of `gather`."""
        new, path = TaggedNodes(self._name, layer), f"{gather.name}.queries"
        query, mask = attention.inputs[_QUERY], attention.inputs[_MASK]
        assert query is not None, "asked by _attended_rows"
        assert mask is not None, "asked by _attended_rows"
        float32, int64 = ir.DataType.FLOAT, ir.DataType.INT64
        first = shared_constant(graph, f"{ROUTERS}.second_axis", np.array([1], np.int64))
        last = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))

        # As many queries as the sequence with most active tokens has. TopK lists equal numbers in their order: active
        # tokens come first and as they stand, and what fills the other sequences up is not read afterwards.
        flags = new.add("Cast", active, name=f"{path}.flags", dtype=float32, shape=active.shape, to=int(float32))
        counts = new.add("ReduceSum", flags, first, name=f"{path}.counts", dtype=float32, shape=None, keepdims=0)
        most = new.add("ReduceMax", counts, name=f"{path}.most", dtype=float32, shape=(1,), keepdims=1)
        size = new.add("Cast", most, name=f"{path}.size", dtype=int64, shape=(1,), to=int(int64))
        top = ir.node("TopK", [flags, size], {"axis": 1}, num_outputs=2, name=f"{path}.chosen", metadata_props=new.tags)
        chosen, at = top.outputs
        for value, name, dtype in ((chosen, "chosen", float32), (at, "at", int64)):
            value.name, value.dtype = f"{path}.{name}", dtype
        new.nodes.append(top)
        places = new.add("Unsqueeze", at, last, name=f"{path}.places", dtype=int64, shape=None)

        # Their queries, and their rows of the mask, which is the same for all heads.
        queries = new.add("GatherND", query, places, name=path, dtype=query.dtype, shape=None, batch_dims=1)
        flat = new.add("Squeeze", mask, first, name=f"{path}.mask_rows", dtype=mask.dtype, shape=None)
        rows = new.add("GatherND", flat, places, name=f"{path}.mask_chosen", dtype=mask.dtype, shape=None, batch_dims=1)
        bias = new.add("Unsqueeze", rows, first, name=f"{path}.mask", dtype=mask.dtype, shape=None)
        inputs = [queries, *attention.inputs[1:_MASK], bias, *attention.inputs[_MASK + 1 :]]
        copy = ir.node(
            "Attention",
            inputs,
            dict(attention.attributes),
            num_outputs=len(attention.outputs),
            name=f"{path}.attention",
            metadata_props=new.tags,
        )
        for value, of, part in zip(copy.outputs, attention.outputs, ("attended", *CACHE_PARTS), strict=True):
            value.name, value.type = f"{path}.{part}", of.type
        new.nodes.append(copy)

        # Rows of active tokens, sequence by sequence, as the index has them.
        boolean = ir.DataType.BOOL
        real = new.add("Cast", chosen, name=f"{path}.real", dtype=boolean, shape=None, to=int(boolean))
        nonzero = new.add("NonZero", real, name=f"{path}.nonzero", dtype=int64, shape=None)
        index = new.add("Transpose", nonzero, name=f"{path}.index", dtype=int64, shape=None, perm=(1, 0))
        result = gather.outputs[0]
        new.add("GatherND", copy.outputs[0], index, name=f"{path}.rows", dtype=result.dtype, shape=result.shape)
        return new

    def _is_long(self, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """Bool of one element, once per step."""
        tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
        tags, int64, name = TaggedNodes(self._name, None).tags, ir.DataType.INT64, f"{ROUTERS}.sequence"
        sequence = shared_node(
            graph, "Shape", tokens, name=name, tags=tags, dtype=int64, shape=(1,), before=before, start=1, end=2
        )
        least = shared_constant(graph, f"{ROUTERS}.long_sequence", np.array(self.least, np.int64))
        return shared_node(
            graph,
            "GreaterOrEqual",
            sequence,
            least,
            name=f"{ROUTERS}.is_long",
            tags=tags,
            dtype=ir.DataType.BOOL,
            shape=(1,),
            before=before,
        )


def _attention_of(nodes: TaggedNodes) -> ir.Node:
    return next(node for node in nodes.nodes if is_op(node, "Attention"))


def _attended_rows(graph: ir.Graph, holder: ir.Node) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Attention in a branch whose result is read for active tokens alone: with that reader, and who is active."""
    if not any(value.name == INPUT_IDS for value in graph.inputs):
        return
    for branch in subgraphs_of(holder):
        for attention in branch:
            if not is_op(attention, "Attention") or not _is_plain(attention):
                continue
            uses = tuple(attention.outputs[0].uses())
            gather = uses[0].node if len(uses) == 1 and uses[0].idx == 0 else None
            if gather is None or not is_op(gather, "GatherND") or PASS_KEY not in gather.metadata_props:
                continue
            active = _behind_index(gather.inputs[1])
            if active is not None:
                yield attention, gather, active


def _is_plain(attention: ir.Node) -> bool:
    """Whether its mask says everything, and its queries are [batch, sequence, …]."""
    attributes, inputs = attention.attributes, attention.inputs
    if attributes.get_int("is_causal", 0) or not attributes.get_int("q_num_heads", 0):
        return False
    return len(inputs) == _INPUTS and all(value is not None for value in inputs) and len(attention.outputs) == _OUTPUTS


def _behind_index(index: ir.Value | None) -> ir.Value | None:
    """Who is active, bool [batch, sequence], of compaction's index."""
    transpose = None if index is None else index.producer()
    if transpose is None or not is_op(transpose, "Transpose") or transpose.inputs[0] is None:
        return None
    nonzero = transpose.inputs[0].producer()
    return nonzero.inputs[0] if nonzero is not None and is_op(nonzero, "NonZero") else None
