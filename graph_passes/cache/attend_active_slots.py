"""Run attention on active tokens' queries and on the slots they see, on a cache in place, where a step is long."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS, KV_LENGTHS
from dlo_export.graph_passes.branches import Branch
from dlo_export.graph_passes.cache.use_group_query_attention import UseGroupQueryAttentionPass
from dlo_export.graph_passes.cache.use_static_cache import OPSET
from dlo_export.graph_passes.cleanup.long_attention import LongAttention
from dlo_export.graph_passes.cleanup.long_steps import (
    LEAST,
    AttendedRows,
    LongStep,
    attended_rows,
    choose_in_long_steps,
    copies,
    told_in_branch,
)
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass

_QUERY, _PAST, _TABLES, _BIAS = slice(0, 3), slice(3, 5), slice(7, 9), 10  # inputs of the operator


@dataclasses.dataclass(frozen=True)
class AttendActiveSlotsPass(GraphPass):
    """Give attention in a branch of compaction's If active tokens' queries, and keys that they see, in long steps.

    Before::

        bias         = Where(seen, zeros, lowest)                           # seen bool [1, 1, 1, filled]; if any skips
        a, pk, pv    = GroupQueryAttention <do_rotary = 1> (qkv, "", "", past_key, past_value, …, cos, sin, "", bias)
        rows         = GatherND(a, idx)                                     # [n, …], of active tokens

    After::

        rows, pk, pv = If(sequence >= least) <
          then_branch = {
            rows, pk, pv = If(most active tokens < sequence) <
              then_branch = {
                first        = kv_lengths - sequence
                at           = Gather<axis=1>(idx, 1) + first                # [n], slots of active tokens
                q, k, v      = Split(qkv)
                q'           = RotaryEmbedding(GatherND(q, idx), Gather(cos, at), Gather(sin, at))
                k'           = RotaryEmbedding(k, Slice(cos, first, kv_lengths), Slice(sin, first, kv_lengths))
                pk, pv       = TensorScatter(past_key, k', first), TensorScatter(past_value, v, first)
                slots        = NonZero(seen)                                 # or all that are filled
                rows         = Attention(q', Gather(pk, slots), Gather(pv, slots), slots <= at)
              }, else_branch = { as before }
            >
          }, else_branch = { as before }
        >

    The operator takes as many queries as keys, and looks at every filled slot; the standard one is given what is left
    of both, for a copy of the keys and values that are seen. Such a step is one of a single sequence, as for the
    operator. Scope: branches of the main graph's Ifs. Source: ONNX Attention-23, TensorScatter-24, RotaryEmbedding-23.

    Attributes:
        least: Tokens in a step that is long.
    """

    least: int = LEAST

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (UseGroupQueryAttentionPass,)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every attention whose result only active tokens read."""
        graph = model.graph
        found = attended_rows(graph, lambda node: is_op(node, "GroupQueryAttention", domain=MICROSOFT))
        for rows in found:
            told = told_in_branch(rows.attention, _BIAS)
            some = partial(self._some_slots, graph, rows, told)
            choose_in_long_steps(graph, rows, some, told=told, least=self.least, made_by=self._name)
        if found:
            graph.opset_imports[""] = max(OPSET, graph.opset_imports[""])
            graph.sort()
        return bool(found)

    def _some_slots(self, graph: ir.Graph, rows: AttendedRows, told: Sequence[ir.Node], step: LongStep) -> Branch:
        """Attends from active queries alone; gives their rows in the order of the index, and the cache."""
        long = _LongAttention(graph, rows, self._name, step)
        query, key, value = long.query_key_value()
        present = [long.written(key, 0), long.written(value, 1)]
        slots, seen = long.seen(present, told)
        attended = long.attended(query, seen, long.mask(slots))
        return long.nodes, [long.as_rows(attended), *present]


class _LongAttention(LongAttention):
    """The nodes of an attention in a long step on a cache in place, which is of one sequence.

    Args:
        graph: The main graph.
        rows: What attends.
        made_by: Name of the pass.
        step: What is known of it.
    """

    def __init__(self, graph: ir.Graph, rows: AttendedRows, made_by: str, step: LongStep) -> None:
        super().__init__(graph, rows, made_by, step, past=_PAST, heads="num_heads")
        self._filled = next(value for value in graph.inputs if value.name == KV_LENGTHS)
        self._first = self.number("Sub", self._filled, step.sequence, name="first")
        columns = self.number("Gather", rows.index, self.constant("one", 1), name="columns", axis=1)
        self._at = self.number("Add", columns, self._first, name="at")

    def query_key_value(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries of active tokens, [1, n, …]; keys and values of all, [1, sequence, …]: as attention takes them."""
        query, key, value = self._apart()
        axis_0 = self.constant("axis_0", [0])
        chosen = self.add("GatherND", query, self.rows.index, name="chosen")
        query = self.add("Unsqueeze", chosen, axis_0, name="query")
        tables = [table for table in self.rows.attention.inputs[_TABLES] if table is not None]
        if tables:
            step = (self._first, self._filled, axis_0)
            own = [self.add("Gather", each, self._at, name=f"query_{n}", axis=0) for n, each in enumerate(tables)]
            every = [self.add("Slice", each, *step, name=f"key_{n}") for n, each in enumerate(tables)]
            query = self._rotated(query, own, "query", self.heads)
            key = self._rotated(key, every, "key", self.kv_heads)
        return query, key, value

    def written(self, new: ir.Value, part: int) -> ir.Value:
        """The cache of keys (part 0) or values (1), with the step's in their slots."""
        name = CACHE_PARTS[part]
        heads = self.heads_first(new, name, self.kv_heads)
        return self.add("TensorScatter", self.past[part], heads, self._first, name=f"{name}_slots", axis=2)

    def seen(self, present: Sequence[ir.Value], told: Sequence[ir.Node]) -> tuple[ir.Value, list[ir.Value]]:
        """Slots that are seen, int64 [seen], and their keys and values, [1, kv_heads, seen, head_dim]."""
        if told:
            asked = copies(told[:-1], self.path, self.new.tags)  # all but the bias
            self.nodes.extend(asked)
            places = self.number("NonZero", asked[-1].outputs[0], name="seen")
            slots = self.number("Gather", places, self.constant("last", 3), name="slots", axis=0)
            return slots, [self.add("Gather", each, slots, name=f"seen_{n}", axis=2) for n, each in enumerate(present)]
        count = self.number("Squeeze", self._filled, name="filled")
        slots = self.number("Range", self.constant("zero", 0), count, self.constant("one", 1), name="slots")
        ends = (self.constant("axis_0", [0]), self._filled, self.constant("axis_2", [2]))
        return slots, [self.add("Slice", each, *ends, name=f"seen_{n}") for n, each in enumerate(present)]

    def mask(self, slots: ir.Value) -> ir.Value:
        """Whether a slot is none behind a token's own: bool [n, seen]."""
        column = self.number("Unsqueeze", self._at, self.constant("axis_1", [1]), name="at_column")
        return self.add("LessOrEqual", slots, column, name="mask", dtype=ir.DataType.BOOL)

    def _apart(self) -> list[ir.Value]:
        """Query, key and value of all tokens."""
        given = [value for value in self.rows.attention.inputs[_QUERY] if value is not None]
        if len(given) == 3:
            return given
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        sizes = self.constant("x".join(map(str, ("widths", *widths))), widths)
        name, tags = f"{self.path}.apart", dict(self.new.tags)
        split = ir.node("Split", [*given, sizes], {"axis": -1}, num_outputs=3, name=name, metadata_props=tags)
        for output, part in zip(split.outputs, ("query", *CACHE_PARTS), strict=True):
            output.name, output.dtype = f"{name}.{part}", self.dtype
        self.nodes.append(split)
        return list(split.outputs)

    def _rotated(self, value: ir.Value, tables: Sequence[ir.Value], name: str, heads: int) -> ir.Value:
        axis_0 = self.constant("axis_0", [0])
        of_batch = [self.add("Unsqueeze", table, axis_0, name=f"{name}_table_{n}") for n, table in enumerate(tables)]
        return self.add("RotaryEmbedding", value, *of_batch, name=f"{name}_rotated", num_heads=heads)
