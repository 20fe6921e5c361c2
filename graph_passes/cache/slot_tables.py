"""Cosine and sine of every slot of a cache, as constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.cache.rotary_tables import RotaryTables
from dlo_export.graph_passes.spec.provenance import shared_constant

_ROTARY = "model.rotary_emb"


class SlotTables:
    """The tables that queries and keys are rotated by: of all layers that are rotated alike, one pair, computed once.

    Args:
        graph: The main graph; holds them.
        max_cache: Slots per sequence.
    """

    def __init__(self, graph: ir.Graph, max_cache: int) -> None:
        self._graph, self._max_cache = graph, max_cache
        self._made = dict[tuple[bytes, np.float32, ir.DataType], list[ir.Value]]()

    def of(self, rotary: RotaryTables, dtype: ir.DataType) -> list[ir.Value]:
        """Cosines and sines, of this type: each [max_cache, head_dim / 2]; a row is a position, and so is a slot."""
        key = (rotary.frequencies.tobytes(), rotary.factor, dtype)
        if key not in self._made:
            self._made[key] = self._computed(rotary, dtype)
        return self._made[key]

    def _computed(self, rotary: RotaryTables, dtype: ir.DataType) -> list[ir.Value]:
        # Angles in float32, as the graph computed them. NumPy's float32 cosine differs in its last bit by which vector
        # instructions a CPU has: rounded from float64, tables are the same wherever a graph is built again.
        angles = np.arange(self._max_cache, dtype=np.float32)[:, np.newaxis] * rotary.frequencies.reshape(1, -1)
        tables = []
        for function in (np.cos, np.sin):
            values = function(angles, dtype=np.float64).astype(np.float32)
            values *= rotary.factor
            name = f"{_ROTARY}.{function.__name__}_table"
            tables.append(shared_constant(self._graph, name, values.astype(dtype.numpy(), copy=False)))
        return tables
