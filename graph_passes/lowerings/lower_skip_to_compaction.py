"""Make routed layers skip: run the MLP branch on the rows of active tokens only."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank
from dlo_export.graph_passes.routing.active_rows import (
    masked_layers,
    remove_with_sources,
    run_on_rows,
    scale_rows,
    stream_for_all_tokens,
)
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_OLDEST_OPSET = 16  # ScatterND adds from here on


@dataclasses.dataclass(frozen=True)
class LowerSkipToCompactionPass(ir.passes.InPlacePass):
    """Gather the active tokens, run norm and MLP on them, add the results back to the stream in place.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After (n tokens are active; n may be 0)::

        idx  = Transpose(NonZero(active))                    # int64 [n, 2]
        rows = GatherND(h, idx)                              # [n, hidden]
        d    = MLP(RMSNormalization(rows))                   # the same nodes, on rows
        kept = Mul(Unsqueeze(GatherND(scale, idx), -1), d)
        y    = ScatterND(h, idx, kept, reduction="add")      # indices are unique: one addition per element

    Rows are [1, n, hidden] instead where a node of the branch counts its axes from the front. ONNX Runtime's CPU kernel
    of ScatterND adds in float32 and float64 only, so a 16-bit graph lowered this way needs another runtime. Scope:
    every routed decoder layer of the main graph. Source: ONNX ScatterND-16.
    """

    runs_after: ClassVar[tuple[type[ir.passes.PassBase], ...]] = (RouteLayersPass,)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every layer in masked form.

        Raises:
            GraphPassError: Nothing is routed, or a masked layer cannot be lowered; with all reasons.
        """
        graph = model.graph
        masked = masked_layers(
            graph, type(self).__name__, oldest_opset=_OLDEST_OPSET, check=lambda layer: row_rank(layer.nodes)[1]
        )
        for layer in masked:
            _lower(graph, layer, row_rank(layer.nodes)[0])
        if masked:
            graph.sort()
        return ir.passes.PassResult(model, modified=bool(masked))


def _lower(graph: ir.Graph, masked: MaskedMlp, rank: int) -> None:
    layer, block, nodes = masked.layer, masked.layer.mlp, masked.nodes
    router, mlp, count = (
        f"model.routers.{layer.index}",
        f"model.layers.{layer.index}.mlp",
        f"active_tokens_{layer.index}",
    )
    int64, dtype = ir.DataType.INT64, element_type(block.stream_in)
    gather = TaggedNodes(LowerSkipToCompactionPass.__name__, layer.index)
    nonzero = gather.add("NonZero", masked.active, name=f"{router}.nonzero", dtype=int64, shape=(2, count))
    index = gather.add("Transpose", nonzero, name=f"{router}.index", dtype=int64, shape=(count, 2), perm=(1, 0))
    row_shape = (count, layer.hidden_size)
    rows = gather.add("GatherND", block.stream_in, index, name=f"{mlp}.rows", dtype=dtype, shape=row_shape)
    first_axis = shared_constant(graph, "model.routers.first_axis", np.array([0], np.int64)) if rank == 3 else None
    if first_axis is not None:
        rows = gather.add("Unsqueeze", rows, first_axis, name=f"{mlp}.rows_3d", dtype=dtype, shape=(1, *row_shape))
    stream = stream_for_all_tokens(masked, gather)
    if masked.scale is not None and masked.scaling is not None:
        scale_rows(graph, masked, gather, functools.partial(_gather_scale, gather, router, index, count), count)
    run_on_rows(nodes, block.stream_in, rows, (count,) if rank == 2 else (1, count))
    graph.insert_before(nodes[0], gather.nodes)

    scatter = TaggedNodes(LowerSkipToCompactionPass.__name__, layer.index)
    kept, dtype = masked.kept, element_type(block.stream_operand)
    if first_axis is not None:
        kept = scatter.add("Squeeze", kept, first_axis, name=f"{mlp}.kept_rows", dtype=dtype, shape=row_shape)
    output = block.stream_out
    name = output.name or f"model.layers.{layer.index}"
    total = scatter.add("ScatterND", stream, index, kept, name=name, dtype=dtype, shape=output.shape, reduction="add")
    graph.insert_before(block.add, scatter.nodes)
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    output.name = f"{name}.masked"  # the value is gone in a moment; until then no two may share a name
    remove_with_sources(graph, block.add)


def _gather_scale(nodes: TaggedNodes, router: str, index: ir.Value, count: str, scale: ir.Value) -> ir.Value:
    return nodes.add("GatherND", scale, index, name=f"{router}.scale_rows", dtype=element_type(scale), shape=(count,))
