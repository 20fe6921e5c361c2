"""What a graph computes of a step from how long its sequences are behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import INPUT_IDS, KV_LENGTHS
from dlo_export.graph_passes.cache.use_static_cache import OPSET
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_LENGTHS = "model.kv_lengths"


class StepLengths:
    """What a step is told of its sequences by `kv_lengths`, and what follows from that; each is computed once.

    Args:
        graph: The main graph.
        made_by: Name of the pass.
    """

    def __init__(self, graph: ir.Graph, made_by: str) -> None:
        self.kv_lengths = ir.val(KV_LENGTHS, dtype=ir.DataType.INT64, shape=["batch"])
        self._graph = graph
        self._new, self._made = TaggedNodes(made_by, None), dict[str, ir.Value]()

    def past(self) -> ir.Value:
        """The operator's: int32 [batch], one less than there are tokens behind the step."""
        one, int32 = self._constant("one", np.array(1, np.int64)), ir.DataType.INT32
        less = self._node("Sub", self.kv_lengths, one, name="less", shape=("batch",))
        return self._node("Cast", less, name="int32", shape=("batch",), dtype=int32, to=int(int32))

    def filled(self) -> ir.Value:
        """Tokens of the longest sequence behind the step, all of which stand in so many slots: int64 [1]."""
        return self._node("ReduceMax", self.kv_lengths, name="filled", shape=(1,), keepdims=1)

    def total(self) -> ir.Value:
        """The operator's: the same, int32 [1]."""
        # No Cast of `filled`: branches read both, and ONNX Runtime warns that it cannot make one of them.
        int32 = ir.DataType.INT32
        each = self._node("Cast", self.kv_lengths, name="lengths_int32", shape=("batch",), dtype=int32, to=int(int32))
        return self._node("ReduceMax", each, name="total", shape=(1,), dtype=int32, keepdims=1)

    def write_indices(self) -> ir.Value:
        """TensorScatter's, which needs its opset: the slots of the step's first tokens, int64 [batch]."""
        self._graph.opset_imports[""] = max(OPSET, self._graph.opset_imports[""])
        return self._first_slots()

    def open_bias(self, dtype: ir.DataType) -> ir.Value:
        """Zeros [1, 1, sequence, 1]: nobody is hidden by it, since later tokens are by the operator itself."""
        ones, one = self._constant("ones", np.array([1, 1])), self._constant("axes_1", np.array([1]))
        sizes = self._node("Concat", ones, self._sequence(), one, name="bias_sizes", shape=(4,), axis=0)
        zero = ir.tensor(np.zeros(1, dtype.numpy()))
        shape, name = (1, 1, "sequence", 1), f"open_bias_{dtype.name.lower()}"
        return self._node("ConstantOfShape", sizes, name=name, shape=shape, dtype=dtype, value=zero)

    def rows_of(self, table: ir.Value) -> ir.Value:
        """Of a constant with a row for each slot, those of the step's: [batch, sequence, …]."""
        assert table.dtype is not None, "it is a constant"
        name = f"rows_of_{table.name}"
        return self._node("Gather", table, self._positions(), name=name, shape=None, dtype=table.dtype, axis=0)

    def _positions(self) -> ir.Value:
        """Slots of the step's tokens: int64 [batch, sequence]."""
        zero, one = (self._constant(name, np.array(number)) for name, number in (("zero", 0), ("one", 1)))
        axis_0, axis_1 = (self._constant(f"axes_{axis}", np.array([axis])) for axis in (0, 1))
        count = self._node("Squeeze", self._sequence(), axis_0, name="sequence", shape=())
        columns = self._node("Range", zero, count, one, name="columns", shape=("sequence",))
        rows = self._node("Unsqueeze", self._first_slots(), axis_1, name="rows", shape=("batch", 1))
        return self._node("Add", rows, columns, name="positions", shape=("batch", "sequence"))

    def place(self) -> None:
        """Puts what was made in front of everything else."""
        self._graph.insert_before(self._graph[0], self._new.nodes)

    def _first_slots(self) -> ir.Value:
        return self._node("Sub", self.kv_lengths, self._sequence(), name="first_slots", shape=("batch",))

    def _sequence(self) -> ir.Value:
        """Tokens of each sequence: int64 [1]."""
        ids = next(value for value in self._graph.inputs if value.name == INPUT_IDS)
        return self._node("Shape", ids, name="sequence_axis", shape=(1,), start=1, end=2)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return shared_constant(self._graph, f"{_LENGTHS}.{name}", array)

    def _node(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        shape: tuple[int | str, ...] | None,
        dtype: ir.DataType = ir.DataType.INT64,
        **attributes: Any,
    ) -> ir.Value:
        if name not in self._made:
            path = f"{_LENGTHS}.{name}"
            self._made[name] = self._new.add(op_type, *inputs, name=path, dtype=dtype, shape=shape, **attributes)
        return self._made[name]
