"""The nodes of an attention in a long step on a cache that grows: active tokens' queries, and the keys these see."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS, present_active_name
from dlo_export.graph_passes.branches import Branch
from dlo_export.graph_passes.cleanup.long_attention import LongAttention
from dlo_export.graph_passes.cleanup.long_steps import AttendedRows, LongStep, copies, most_active, told_in_branch
from dlo_export.graph_passes.find.data_flow import behind, is_op
from dlo_export.graph_passes.routing.mask_blocks import router_constant

QUERY, KEY, MASK, PAST = 0, 1, 3, slice(4, 6)  # inputs of an Attention node


@dataclasses.dataclass(frozen=True, eq=False)
class SkippedKeys:
    """Where an attention is told that skipped tokens have no keys, as `RouteLayersPass` writes it.

    Attributes:
        node: Where(Unsqueeze(active, [1, 2]), mask, lowest), beside the attention.
        active: Who is active and was, bool [batch, total].
        mask: What it says besides, [batch, 1, sequence, total].
        lowest: Of nobody's scores, 0-D.
    """

    node: ir.Node
    active: ir.Value
    mask: ir.Value
    lowest: ir.Value

    @classmethod
    def of(cls, rows: AttendedRows) -> SkippedKeys | None:
        """None where skipped tokens leave keys.

        Args:
            rows: What attends.
        """
        told = told_in_branch(rows.attention, MASK)
        if not told or not is_op(told[-1], "Where") or rows.layer is None:
            return None
        condition, mask, lowest = told[-1].inputs
        active = behind(condition, "Unsqueeze")
        if active is None or mask is None or lowest is None or active.name != present_active_name(rows.layer):
            return None
        return cls(told[-1], active, mask, lowest)


class ActiveQueries(LongAttention):
    """Makes them for sequences of which one has more active tokens than another: all get as many as the first.

    Args:
        graph: The main graph.
        rows: What attends.
        made_by: Name of the pass.
        step: What is known of it.
    """

    def __init__(self, graph: ir.Graph, rows: AttendedRows, made_by: str, step: LongStep) -> None:
        super().__init__(graph, rows, made_by, step, past=PAST, heads="q_num_heads")
        self._first_axis, self._second_axis = self.constant("axis_1", [1]), self.constant("axis_2", [2])
        self._flags, at = self._active_first(step.flags, step.size, "query")
        self._places = self.number("Unsqueeze", at, self._second_axis, name="places")

    def branch(self, skipped: SkippedKeys | None) -> Branch:
        """Rows of active tokens in the order of the index, and the cache.

        Args:
            skipped: Which keys are left out; None where all are seen.
        """
        attended, present = self._all_keys() if skipped is None else self._active_keys(skipped)
        # Of a sequence with fewer active tokens, those it has.
        real = self.add("Cast", self._flags, name="real", dtype=ir.DataType.BOOL, to=int(ir.DataType.BOOL))
        nonzero = self.number("NonZero", real, name="nonzero")
        index = self.number("Transpose", nonzero, name="index", perm=(1, 0))
        gathered = self.add("GatherND", attended, index, name="gathered")
        return self.nodes, [gathered if skipped is None else self.as_rows(gathered), *present]

    def _all_keys(self) -> tuple[ir.Value, Sequence[ir.Value]]:
        """What the operator itself attends to, [batch, queries, heads·head_dim], and its cache."""
        bias = self.add("Unsqueeze", self._rows_of(self._operand(MASK)), self._first_axis, name="mask")
        (attends,) = copies([self.rows.attention], self.path, self.new.tags)
        attends.replace_input_with(QUERY, self._query())
        attends.replace_input_with(MASK, bias)
        attends.outputs[0].shape = None  # of fewer tokens
        self.nodes.append(attends)
        return attends.outputs[0], attends.outputs[1:]

    def _active_keys(self, skipped: SkippedKeys) -> tuple[ir.Value, Sequence[ir.Value]]:
        """Likewise, [batch, queries, heads, head_dim]: of active tokens' keys; the cache holds all of them."""
        flags, size = most_active(self.graph, self.new, skipped.active, f"{self.path}.keys")
        real, at = self._active_first(flags, size, "key")

        # The cache as the operator gives it, and of it what is seen: where a sequence has fewer active tokens than
        # another, skipped ones besides.
        present = [self._grown(part) for part in range(len(CACHE_PARTS))]
        slots = self.number("Unsqueeze", at, self.constant("axes_1_3", [1, 3]), name="slots")
        of_heads = self.constant(f"of_{self.kv_heads}_heads", [1, self.kv_heads, 1, 1])
        every = self.number("Expand", slots, of_heads, name="head_slots")
        seen = [
            self.add("GatherND", cache, every, name=f"seen_{part}", batch_dims=2)
            for cache, part in zip(present, CACHE_PARTS, strict=True)
        ]
        bias = self._columns_of(self._rows_of(skipped.mask), at)
        # The latter are hidden. By Min, which takes an eighth of Where's time here.
        boolean, highest = ir.DataType.BOOL, router_constant(self.graph, "highest", float(self.dtype.max), self.dtype)
        shown = self.add("Cast", real, name="key_shown", dtype=boolean, to=int(boolean))
        bounds = self.add("Where", shown, highest, skipped.lowest, name="key_bounds")
        across = self.add("Unsqueeze", bounds, self._first_axis, name="key_bounds_across")
        bias = self.add("Min", bias, across, name="hidden")
        bias = self.add("Unsqueeze", bias, self._first_axis, name="mask")
        return self.attended(self._query(), seen, bias), present

    def _query(self) -> ir.Value:
        return self.add("GatherND", self._operand(QUERY), self._places, name="query", batch_dims=1)

    def _rows_of(self, mask: ir.Value) -> ir.Value:
        """What a mask, which is the same for all heads, says to the queries: [batch, queries, total]."""
        flat = self.add("Squeeze", mask, self._first_axis, name="mask_rows")
        return self.add("GatherND", flat, self._places, name="mask_chosen", batch_dims=1)

    def _columns_of(self, rows: ir.Value, at: ir.Value) -> ir.Value:
        """Of rows of a mask, what they say of some keys: [batch, queries, keys].

        Args:
            rows: [batch, queries, total].
            at: Whose, int64 [batch, keys].
        """
        column = self.number("Unsqueeze", at, self._first_axis, name="columns")
        sizes = self.number("Concat", self._first_axis, self.step.size, self._first_axis, name="column_sizes", axis=0)
        every = self.number("Expand", column, sizes, name="row_columns")
        return self.add("GatherElements", rows, every, name="mask_columns", axis=2)

    def _grown(self, part: int) -> ir.Value:
        """The cache of keys (part 0) or values (1), with the step's behind it."""
        name = CACHE_PARTS[part]
        heads = self.heads_first(self._operand(KEY + part), name, self.kv_heads)
        return self.add("Concat", self.past[part], heads, name=f"{name}_grown", axis=2)

    def _active_first(self, flags: ir.Value, size: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Of each sequence's tokens so many, active ones first: whether they are, and where, [batch, size] each.

        TopK lists equal numbers in their order: active tokens stand as they stood, and others fill the sequences up.
        """
        path, tags = f"{self.path}.{name}_top", dict(self.new.tags)
        top = ir.node("TopK", (flags, size), {"axis": 1}, num_outputs=2, name=path, metadata_props=tags)
        active, at = top.outputs
        active.name, active.dtype = f"{path}.active", ir.DataType.FLOAT
        at.name, at.dtype = f"{path}.at", ir.DataType.INT64
        self.nodes.append(top)
        return active, at

    def _operand(self, number: int) -> ir.Value:
        value = self.rows.attention.inputs[number]
        assert value is not None, "it reads all of them"
        return value
