"""The nodes of an attention in a long step, which is given some of the queries, and of the keys what these see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.cleanup.long_steps import AttendedRows, LongStep
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant


class LongAttention:
    """Makes them, whatever the cache: what takes the place of an attention, and gives active tokens' rows.

    Args:
        graph: The main graph.
        rows: What attends.
        made_by: Name of the pass.
        step: What is known of the step.
        past: Which of its inputs are keys and values so far, [batch, kv_heads, slots, head_dim] each.
        heads: Its attribute that says how many heads its queries have.
    """

    def __init__(
        self,
        graph: ir.Graph,
        rows: AttendedRows,
        made_by: str,
        step: LongStep,
        *,
        past: slice,
        heads: str,
    ) -> None:
        node = rows.attention
        self.past = [value for value in node.inputs[past] if value is not None]
        key = self.past[0]
        assert key.shape is not None, "a cache has a shape"
        assert isinstance(key.shape[1], int), "of so many heads"
        assert isinstance(key.shape[3], int), "of this width"
        assert key.dtype is not None, "of this type"
        self.graph, self.rows, self.step, self.heads = graph, rows, step, node.attributes[heads].as_int()
        self.kv_heads, self.head_dim, self.dtype = key.shape[1], key.shape[3], key.dtype
        self.new, self.path = TaggedNodes(made_by, rows.layer), f"{rows.path}.some"

    @property
    def nodes(self) -> list[ir.Node]:
        """Those made so far, in order."""
        return self.new.nodes

    def heads_first(self, value: ir.Value, name: str, heads: int) -> ir.Value:
        """Of [batch, tokens, heads·head_dim] or rows of it: [batch, heads, tokens, head_dim]."""
        shape = self.constant(f"heads_{heads}x{self.head_dim}", [0, 0, heads, self.head_dim])
        apart = self.add("Reshape", value, shape, name=f"{name}_heads")
        return self.add("Transpose", apart, name=f"{name}_heads_first", perm=(0, 2, 1, 3))

    def attended(self, query: ir.Value, seen: Sequence[ir.Value], mask: ir.Value) -> ir.Value:
        """What queries attend to, [batch, n, heads, head_dim].

        Args:
            query: [batch, n, heads·head_dim].
            seen: Keys and values, [batch, kv_heads, seen, head_dim] each.
            mask: Of bool or additive; broadcasts to [batch, 1, n, seen].
        """
        given = self.rows.attention.attributes
        scale: dict[str, Any] = {"scale": given["scale"].as_float()} if "scale" in given else {}
        heads = self.heads_first(query, "query", self.heads)
        found = self.add("Attention", heads, *seen, mask, name="attention", **scale)
        return self.add("Transpose", found, name="tokens_first", perm=(0, 2, 1, 3))

    def as_rows(self, attended: ir.Value) -> ir.Value:
        """Heads side by side: [n, heads·head_dim]."""
        width = self.heads * self.head_dim
        return self.add("Reshape", attended, self.constant(f"rows_{width}", [-1, width]), name="rows")

    def number(self, op_type: str, *inputs: ir.Value, name: str, **attributes: Any) -> ir.Value:
        """The output of a new node, int64."""
        return self.add(op_type, *inputs, name=name, dtype=ir.DataType.INT64, **attributes)

    def add(
        self, op_type: str, *inputs: ir.Value, name: str, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """The output of a new node, of the type of keys and values unless another is given."""
        path = f"{self.path}.{name}"
        return self.new.add(op_type, *inputs, name=path, dtype=dtype or self.dtype, shape=None, **attributes)

    def constant(self, name: str, values: int | list[int]) -> ir.Value:
        """Whole numbers that all layers share."""
        return shared_constant(self.graph, f"{ROUTERS}.long_step.{name}", np.array(values, np.int64))
