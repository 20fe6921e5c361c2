"""Name the batch dimension as clients look for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from dlo_export.checkpoints.interface import TOKEN_INPUTS, is_state_input
from dlo_export.graph_passes.spec.pass_contract import GraphPass

# optimum's name. transformers.js makes the empty cache from the names of the dimensions: this one is the batch,
# every other one is 0.
BATCH = "batch_size"


@dataclasses.dataclass(frozen=True)
class NameBatchDimensionPass(GraphPass):
    """Call the first dimension of tokens and cache `batch_size`, wherever it occurs.

    Before::

        (int64[batch, sequence] input_ids, …, float[batch, 4, past, 64] past_key_values.0.key) => …

    After::

        (int64[batch_size, sequence] input_ids, …, float[batch_size, 4, past, 64] past_key_values.0.key) => …

    Optional: a graph with this name, or with a fixed batch, is left alone. Scope: shapes of the main graph and of
    subgraphs; no node changes.
    Source: transformers.js 4, `addPastKeyValues`.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Renames every dimension that carries a batch's name."""
        old = set(_batch_names(model.graph)) - {BATCH}
        # Also where nodes made it of the inputs: one size under two names would tell shape inference less.
        for value in _values(model.graph) if old else ():
            if value.shape is not None and not old.isdisjoint(map(_name, value.shape)):
                value.shape = ir.Shape([BATCH if _name(dim) in old else dim for dim in value.shape])
        return bool(old)


def _batch_names(graph: ir.Graph) -> Iterator[str]:
    for value in graph.inputs:
        is_ours = value.name in TOKEN_INPUTS or is_state_input(value.name or "")
        if is_ours and value.shape is not None and len(value.shape) and (name := _name(value.shape[0])):
            yield name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _name(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value
