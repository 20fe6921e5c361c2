"""Make routed layers skip on TensorRT: run the MLP branch on the rows of active tokens, chosen by TopK."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, layer_tensor_name, router_path
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank
from dlo_export.graph_passes.lowerings.active_rows import run_on_rows, scale_rows
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.lowerings.record import LoweringRecord
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

MOST_SELECTED = 3840  # TensorRT's largest K of one TopK


@dataclasses.dataclass(frozen=True)
class LowerSkipToTopKPass(LoweringPass):
    """Gather the active tokens' rows, run norm and MLP on them, put the sums back: in operators TensorRT builds.

    TensorRT-RTX has no NonZero, and its TopK selects 3840 at most: the tokens of a step are cut into chunks of that
    size, each chosen from by a TopK of its own, whose K is the number of active tokens in the chunk. K must be positive
    (ITopKLayer::setInput), so where no token is active TopK chooses one all the same, and a Slice drops it.

    Before::

        d      = MLP(RMSNormalization(h))
        masked = Where(Unsqueeze(active, -1), Mul(Unsqueeze(scale, -1), d), 0)
        y      = Add(h, masked)

    After (one chunk; n tokens are active, n may be 0)::

        flat  = Reshape(h, [-1, hidden])                     # [batch·sequence, hidden]
        flags = Cast(Reshape(active, [-1]))                  # 1 or 0 per token
        n     = ReduceSum(flags)
        _, i1 = TopK(flags, Max(n, 1))
        i     = Slice(i1, 0, n)                              # int64 [n]
        rows  = Gather(flat, i)                              # [n, hidden]
        d     = MLP(RMSNormalization(rows))                  # the same nodes, on rows
        kept  = Mul(Unsqueeze(Gather(Reshape(scale, [-1]), i), -1), d)
        y     = Reshape(ScatterND(flat, Unsqueeze(i, -1), Add(rows, kept)), Shape(h))

    Scope: every routed decoder layer of the main graph. Source: ONNX TopK-11, ScatterND-16.

    Attributes:
        max_tokens: batch·sequence at most; decides the number of chunks.
    """

    max_tokens: int
    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass, UseStaticCachePass)
    oldest_opset: ClassVar[int] = 16  # ScatterND, and TopK with a K that is computed

    @property
    def chunks(self) -> int:
        """How many TopK each layer has."""
        return max(1, -(-self.max_tokens // MOST_SELECTED))

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Nodes that do not compute each token by itself in two dimensions, or a cast between stream and sum."""
        rank, problems = row_rank(masked.nodes)
        if rank != 2:
            problems = [*problems, "its MLP counts axes from the front"]
        if masked.layer.mlp.stream_operand is not masked.layer.mlp.stream_in:
            problems = [*problems, f"adds to '{masked.layer.mlp.stream_operand.name}', a cast of the stream"]
        return problems

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Run the branch of one layer on the rows that its TopKs choose."""
        _Lowering(graph, masked, self.chunks).write()


class _Lowering:
    """The rewriting of one layer."""

    def __init__(self, graph: ir.Graph, masked: MaskedMlp, chunks: int) -> None:
        self.graph, self.masked, self.chunks = graph, masked, chunks
        self.layer = masked.layer
        self.router, self.mlp = router_path(self.layer.index), layer_tensor_name(self.layer.index, "mlp")
        self.count = f"active_tokens_{self.layer.index}"
        self.gather = TaggedNodes(LowerSkipToTopKPass.__name__, self.layer.index)

    def write(self) -> None:
        """Put gathering in front of the branch and scattering behind it."""
        block, gather, masked = self.layer.mlp, self.gather, self.masked
        dtype, hidden = element_type(block.stream_in), self.layer.hidden_size

        # In front: the stream as rows, and those of the active tokens. The branch stays and reads them.
        flat_shape = self._constant("flat_rows", [-1, hidden])
        flat = gather.add(
            "Reshape", block.stream_in, flat_shape, name=f"{self.mlp}.flat", dtype=dtype, shape=("tokens", hidden)
        )
        index = self._active_tokens()
        rows = gather.add("Gather", flat, index, name=f"{self.mlp}.rows", dtype=dtype, shape=(self.count, hidden))
        if masked.scale is not None and masked.scaling is not None:
            scale_rows(self.graph, masked, gather, self._scale_of_rows(masked.scale, index), self.count)
        run_on_rows(masked.nodes, block.stream_in, rows, (self.count,))
        self.graph.insert_before(masked.nodes[0], gather.nodes)

        # Behind: rows are replaced by their sums with the branch, because TensorRT's scatter does not add. The last
        # Reshape gives the stream its shape again and closes the block.
        scatter = TaggedNodes(LowerSkipToTopKPass.__name__, self.layer.index)
        shape = (self.count, hidden)
        sums = scatter.add("Add", rows, masked.kept, name=f"{self.mlp}.row_sums", dtype=dtype, shape=shape)
        places = scatter.add(
            "Unsqueeze",
            index,
            self._constant("last_axis", [-1]),
            name=f"{self.mlp}.row_places",
            dtype=ir.DataType.INT64,
            shape=(self.count, 1),
        )
        merged = scatter.add(
            "ScatterND", flat, places, sums, name=f"{self.mlp}.scattered", dtype=dtype, shape=("tokens", hidden)
        )
        stream_shape = scatter.add(
            "Shape", block.stream_in, name=f"{self.mlp}.stream_shape", dtype=ir.DataType.INT64, shape=(3,)
        )
        output = block.stream_out
        name = output.name or f"{self.mlp}.merged"
        total = scatter.add("Reshape", merged, stream_shape, name=name, dtype=dtype, shape=output.shape, closes=0)
        self.graph.insert_before(block.add, scatter.nodes)
        replace_value(output, total)
        remove_with_sources(self.graph, block.add)

    def _active_tokens(self) -> ir.Value:
        """Indices of the active tokens among all, int64 [count]."""
        # All tokens of the step in one row: to the MLP it does not matter which sequence one belongs to.
        flags = self._add("Reshape", self.masked.active, self._constant("flat", [-1]), name="flat_active")
        flags.type = ir.TensorType(ir.DataType.BOOL)
        flags = self._add("Cast", flags, name="flags", dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        if self.chunks == 1:
            return self._chosen(flags, "")
        # Chunks of constant size: behind the last token there are as many that are never active.
        size = self.chunks * MOST_SELECTED
        padding = shared_constant(self.graph, f"{ROUTERS}.padding_{size}", np.zeros(size, np.float32))
        padded = self._add("Concat", flags, padding, name="padded_flags", dtype=ir.DataType.FLOAT, axis=0)
        parts = []
        for number in range(self.chunks):
            start, end = number * MOST_SELECTED, (number + 1) * MOST_SELECTED
            part = self._add(
                "Slice",
                padded,
                self._constant(f"chunk_{start}", [start]),
                self._constant(f"chunk_{end}", [end]),
                name=f"flags_{number}",
                dtype=ir.DataType.FLOAT,
            )
            chosen = self._chosen(part, f"_{number}")
            # A TopK counts within its chunk.
            offset = self._constant(f"chunk_{start}", [start])
            parts.append(self._add("Add", chosen, offset, name=f"active_tokens_{number}", dtype=ir.DataType.INT64))
        return self._add("Concat", *parts, name="active_tokens", dtype=ir.DataType.INT64, axis=0)

    def _chosen(self, flags: ir.Value, suffix: str) -> ir.Value:
        """Indices of the ones among flags, int64."""
        float32, int64, router = ir.DataType.FLOAT, ir.DataType.INT64, self.router
        # How many there are, and how many TopK is asked for: at least one, since its K must be positive.
        total = self._add("ReduceSum", flags, name=f"total{suffix}", dtype=float32, keepdims=1)
        one = shared_constant(self.graph, f"{ROUTERS}.one", np.array([1], np.float32))
        positive = self._add("Max", total, one, name=f"positive{suffix}", dtype=float32)
        count = self._add("Cast", total, name=f"count{suffix}", dtype=int64, to=int(int64))
        k = self._add("Cast", positive, name=f"k{suffix}", dtype=int64, to=int(int64))
        for value in (total, positive, count, k):
            value.shape = ir.Shape((1,))

        # The largest flags are the ones; where there is none, the Slice behind drops what TopK chose all the same.
        top = ir.node(
            "TopK",
            [flags, k],
            {"axis": 0, "largest": 1, "sorted": 0},
            num_outputs=2,
            name=f"{router}.topk{suffix}",
            metadata_props=dict(self.gather.tags),
        )
        for output, kind, dtype in zip(top.outputs, ("flags", "index"), (float32, int64), strict=True):
            output.name = f"{router}.topk_{kind}{suffix}"
            output.type = ir.TensorType(dtype)
            output.shape = ir.Shape((f"{self.count}{suffix}_or_one",))
        self.gather.nodes.append(top)
        first = self._constant("chunk_0", [0])
        return self._add("Slice", top.outputs[1], first, count, name=f"chosen{suffix}", dtype=int64)

    def _scale_of_rows(self, scale: ir.Value, index: ir.Value) -> ir.Value:
        """The scale of the chosen tokens, [count]."""
        dtype = element_type(scale)
        flat = self._add("Reshape", scale, self._constant("flat", [-1]), name="flat_scale", dtype=dtype)
        return self.gather.add(
            "Gather", flat, index, name=f"{self.router}.scale_rows", dtype=dtype, shape=(self.count,)
        )

    def _add(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        return self.gather.add(op_type, *inputs, name=f"{self.router}.{name}", dtype=dtype, shape=None, **attributes)

    def _constant(self, name: str, numbers: Sequence[int]) -> ir.Value:
        return shared_constant(self.graph, f"{ROUTERS}.{name}", np.array(numbers, np.int64))


RECORD = LoweringRecord(
    name="compact",
    targets=("tensorrt",),
    make_pass=lambda workload: LowerSkipToTopKPass(workload.max_batch * workload.max_sequence),
    stage=lowered_stage(LowerSkipToTopKPass.__name__),
    skips="tokens",
    not_capturable="its data-dependent shapes are read back by the host",
    reason="native operators, skips token by token in prefill, batches and decode alike",
    suits=lambda workload: True,
    tensorrt_layers=frozenset({"TOPK", "GATHER", "SCATTER"}),
    tensorrt_start="TOPK",
)
