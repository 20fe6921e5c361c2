"""Run attention on active tokens' queries only, where a step is long enough for that to pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS, INPUT_IDS
from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.branches import Branch, conditional_node
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.find.data_flow import is_op, producer_of, subgraphs_of
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, PASS_KEY, TaggedNodes, shared_constant, shared_node

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
        branch, number = gather.graph, gather.metadata_props.get(LAYER_KEY)
        assert isinstance(branch, ir.Graph), "a branch of the holder"
        layer, path = None if number is None else int(number), f"{gather.name}.queries"
        new, float32, int64 = TaggedNodes(self._name, layer), ir.DataType.FLOAT, ir.DataType.INT64
        sequence, is_long = self._length(graph, holder)

        # A long step asks for as many queries as the sequence with most active tokens has, unless that skips nothing.
        axis = shared_constant(graph, f"{ROUTERS}.second_axis", np.array([1], np.int64))
        flags = new.add("Cast", active, name=f"{path}.flags", dtype=float32, shape=active.shape, to=int(float32))
        counts = new.add("ReduceSum", flags, axis, name=f"{path}.counts", dtype=float32, shape=None, keepdims=0)
        most = new.add("ReduceMax", counts, name=f"{path}.most", dtype=float32, shape=(1,), keepdims=1)
        size = new.add("Cast", most, name=f"{path}.size", dtype=int64, shape=(1,), to=int(int64))
        fewer = new.add("Less", size, sequence, name=f"{path}.fewer", dtype=ir.DataType.BOOL, shape=(1,))
        some = self._some_queries(graph, attention, gather, (flags, size), layer)
        chosen = _alike(given := (gather.outputs[0], *attention.outputs[1:]), f"{path}.chosen")
        every = _copies(attention, gather, f"{path}.every", new.tags)
        choose = conditional_node(branch, f"{path}.chosen", fewer, some, every, chosen, new.tags)

        # What the outer If gives out takes the place of rows and cache; the branches' own values get other names.
        results = _alike(given, "")
        for old, result in zip(given, results, strict=True):
            replace_value(old, result)
            old.name = f"{result.name}.all_queries"
        long, short = ([*new.nodes, choose], chosen), ([attention, gather], given)
        branch.append(conditional_node(branch, str(gather.name), is_long, long, short, results, new.tags))

    def _some_queries(
        self,
        graph: ir.Graph,
        attention: ir.Node,
        gather: ir.Node,
        active: tuple[ir.Value, ir.Value],
        layer: int | None,
    ) -> Branch:
        """Attends from active queries alone; gives their rows in the order of `gather`, and the cache.

        `active` are flags, float32 [batch, sequence], and how many of a sequence are chosen, int64 [1].
        """
        new, path = TaggedNodes(self._name, layer), f"{gather.name}.queries"
        query, mask = attention.inputs[_QUERY], attention.inputs[_MASK]
        assert query is not None, "asked by _attended_rows"
        assert mask is not None, "asked by _attended_rows"
        float32, int64, boolean = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
        first = shared_constant(graph, f"{ROUTERS}.second_axis", np.array([1], np.int64))
        last = shared_constant(graph, f"{ROUTERS}.last_axis", np.array([-1], np.int64))

        # TopK lists equal numbers in their order: active tokens come first and as they stand, and what fills the other
        # sequences up is not read afterwards.
        top = ir.node("TopK", active, {"axis": 1}, num_outputs=2, name=f"{path}.top", metadata_props=new.tags)
        chosen, at = top.outputs
        for value, name, dtype in ((chosen, "top", float32), (at, "at", int64)):
            value.name, value.dtype = f"{path}.{name}", dtype
        new.nodes.append(top)
        places = new.add("Unsqueeze", at, last, name=f"{path}.places", dtype=int64, shape=None)

        # Their queries, and their rows of the mask, which is the same for all heads.
        queries = new.add("GatherND", query, places, name=path, dtype=query.dtype, shape=None, batch_dims=1)
        flat = new.add("Squeeze", mask, first, name=f"{path}.mask_rows", dtype=mask.dtype, shape=None)
        rows = new.add("GatherND", flat, places, name=f"{path}.mask_chosen", dtype=mask.dtype, shape=None, batch_dims=1)
        bias = new.add("Unsqueeze", rows, first, name=f"{path}.mask", dtype=mask.dtype, shape=None)

        # Rows of active tokens, sequence by sequence, as the index has them.
        real = new.add("Cast", chosen, name=f"{path}.real", dtype=boolean, shape=None, to=int(boolean))
        nonzero = new.add("NonZero", real, name=f"{path}.nonzero", dtype=int64, shape=None)
        index = new.add("Transpose", nonzero, name=f"{path}.index", dtype=int64, shape=None, perm=(1, 0))
        (attends, gathers), results = _copies(attention, gather, f"{path}.some", new.tags)
        attends.replace_input_with(_QUERY, queries)
        attends.replace_input_with(_MASK, bias)
        attends.outputs[0].shape = None  # of fewer tokens
        gathers.replace_input_with(1, index)
        return [*new.nodes, attends, gathers], results

    def _length(self, graph: ir.Graph, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Tokens of a sequence, int64 [1], and whether those are many, bool [1]: once per step."""
        tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
        tags, int64, name = TaggedNodes(self._name, None).tags, ir.DataType.INT64, f"{ROUTERS}.sequence"
        sequence = shared_node(
            graph, "Shape", tokens, name=name, tags=tags, dtype=int64, shape=(1,), before=before, start=1, end=2
        )
        least = shared_constant(graph, f"{ROUTERS}.long_sequence", np.array(self.least, np.int64))
        is_long = shared_node(
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
        return sequence, is_long


def _copies(attention: ir.Node, gather: ir.Node, path: str, tags: Mapping[str, str]) -> Branch:
    """Attention and its reader once more, for another branch; with rows and cache."""
    pair = []
    for node in (attention, gather):
        copy = ir.node(
            node.op_type,
            node.inputs,
            dict(node.attributes),
            num_outputs=len(node.outputs),
            name=f"{path}.{node.op_type.lower()}",
            metadata_props=dict(tags),
        )
        for new, old, part in zip(copy.outputs, node.outputs, ("output", *CACHE_PARTS), strict=False):
            new.name, new.type, new.shape = f"{copy.name}.{part}", old.type, old.shape
        pair.append(copy)
    pair[1].replace_input_with(0, pair[0].outputs[0])
    return pair, [pair[1].outputs[0], *pair[0].outputs[1:]]


def _alike(values: Sequence[ir.Value], path: str) -> list[ir.Value]:
    """Values of the same types and shapes; without a path, without names."""
    names = (f"{path}.{part}" if path else None for part in ("rows", *CACHE_PARTS))
    return [ir.Value(name=name, type=value.type, shape=value.shape) for name, value in zip(names, values, strict=True)]


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
            if not is_op(gather, "GatherND") or PASS_KEY not in gather.metadata_props:
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
    transpose = producer_of(index)
    if not is_op(transpose, "Transpose") or transpose.inputs[0] is None:
        return None
    nonzero = transpose.inputs[0].producer()
    return nonzero.inputs[0] if is_op(nonzero, "NonZero") else None
