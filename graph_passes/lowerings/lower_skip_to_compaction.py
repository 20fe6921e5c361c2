"""Make routed layers skip: run their branches on the rows of active tokens only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS, layer_tensor_name, router_path
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import constant_tensor, element_type, is_op
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank, token_wise_nodes
from dlo_export.graph_passes.lowerings.active_rows import run_on_rows, scale_rows, stream_for_all_tokens, token_zeros
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.lowerings.record import ONNXRUNTIME, LoweringRecord
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant, shared_node


@dataclasses.dataclass(frozen=True)
class LowerSkipToCompactionPass(LoweringPass):
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

    Where attention is masked too (`RouteLayersPass`, kind "layer"), its projections run on rows; attention itself stays
    [batch, sequence] under its mask, with zeros for skipped tokens::

        n    = RMSNormalization(GatherND(x, idx))            # the same nodes, on rows
        q    = RotaryEmbedding(ScatterND(zeros, idx, n·Wq))  # k and v likewise: the zeros that Where wrote before
        a    = Attention(q, k, v, bias, past_key, past_value)
        h    = ScatterND(x, idx, GatherND(a, idx)·Wo, reduction="add")

    Rows are [1, n, hidden] instead where a node of the MLP counts its axes from the front. ONNX Runtime's CPU kernel
    of ScatterND adds in float32 and float64 only, so a 16-bit graph lowered this way needs another runtime. Scope:
    every routed decoder layer of the main graph. Source: ONNX ScatterND-16.
    """

    oldest_opset: ClassVar[int] = 16  # ScatterND adds from here on

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Nodes of the branch that do not compute each token by itself."""
        return row_rank(masked.nodes)[1]

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """Projections that do not compute each token by itself."""
        rows = token_wise_nodes(masked.projections, masked.layer.input)
        problems = [] if any(is_op(node, "MatMul") for node in rows) else ["none of its projections runs on rows"]
        if any(_width(value) is None or element_type(value) is None for value in _boundary(masked, rows)):
            problems.append("the graph does not say how wide its projections are, or of which type")
        behind = token_wise_nodes(masked.outputs, masked.attention.outputs[0])
        problems += [f"{place(node)} does not run on rows" for node in masked.outputs if node not in behind]
        return problems

    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Run the MLP of one layer on its active tokens."""
        layer, block, nodes = masked.layer, masked.layer.mlp, masked.nodes
        router, mlp = router_path(layer.index), layer_tensor_name(layer.index, "mlp")
        count, dtype = _count(masked), element_type(block.stream_in)
        rank, _ = row_rank(nodes)

        # In front of the branch: where the active tokens are, and their rows. A branch that counts its axes from the
        # front gets them as a batch of one.
        index = self._index(graph, masked, nodes[0])
        gather = TaggedNodes(type(self).__name__, layer.index)
        row_shape = (count, layer.hidden_size)
        rows = gather.add("GatherND", block.stream_in, index, name=f"{mlp}.rows", dtype=dtype, shape=row_shape)
        first_axis = shared_constant(graph, f"{ROUTERS}.first_axis", np.array([0], np.int64)) if rank == 3 else None
        if first_axis is not None:
            rows = gather.add("Unsqueeze", rows, first_axis, name=f"{mlp}.rows_3d", dtype=dtype, shape=(1, *row_shape))
        stream = stream_for_all_tokens(block, nodes, gather)

        # The branch itself stays, node by node: it reads rows now, and each row is scaled by its own token's factor.
        if masked.scale is not None and masked.scaling is not None:
            scale_dtype = element_type(masked.scale)
            scale = gather.add(
                "GatherND", masked.scale, index, name=f"{router}.scale_rows", dtype=scale_dtype, shape=(count,)
            )
            scale_rows(graph, masked, gather, scale, count)
        run_on_rows(nodes, block.stream_in, rows, (count,) if rank == 2 else (1, count))
        graph.insert_before(nodes[0], gather.nodes)

        # Behind it: the results are added to the stream in place, which closes the block. Where and Add, and what
        # served only them, are gone: a skipped token keeps h because nothing is added to it.
        scatter = TaggedNodes(type(self).__name__, layer.index)
        kept, dtype = masked.kept, element_type(block.stream_operand)
        if first_axis is not None:
            kept = scatter.add("Squeeze", kept, first_axis, name=f"{mlp}.kept_rows", dtype=dtype, shape=row_shape)
        _close(graph, masked, scatter, stream, index, kept, f"{mlp}.added_rows")

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Run the projections of one layer's attention on its active tokens."""
        layer, block, attention = masked.layer, masked.layer.attention, masked.attention
        name, count = layer_tensor_name(layer.index, "self_attn"), _count(masked)
        rows_of = token_wise_nodes(masked.projections, block.stream_in)
        boundary = _boundary(masked, rows_of)
        index = self._index(graph, masked, rows_of[0])

        # In front: the projections read rows. What is behind them (rotary embedding, attention) is for all tokens
        # again, zeros where a token skips: they are scattered into zeros that all layers share.
        gather = TaggedNodes(type(self).__name__, layer.index)
        dtype = element_type(block.stream_in)
        rows = gather.add(
            "GatherND", block.stream_in, index, name=f"{name}.rows", dtype=dtype, shape=(count, layer.hidden_size)
        )
        stream = stream_for_all_tokens(block, rows_of, gather)
        graph.insert_before(rows_of[0], gather.nodes)
        run_on_rows(rows_of, block.stream_in, rows, (count,))
        placed = [self._scatter(graph, masked, value, rows_of, index) for value in boundary]

        # Rotated zeros are zeros, so keys and values need no Where any more; through other nodes they keep it.
        for position, select in ((1, masked.key_select), (2, masked.value_select)):
            computed = select.inputs[1]
            if computed is not None and _unrotated(computed) in placed:
                attention.replace_input_with(position, computed)
                remove_with_sources(graph, select)

        # Behind attention, rows once more.
        behind = TaggedNodes(type(self).__name__, layer.index)
        attended = attention.outputs[0]
        if masked.outputs:
            attended_rows = behind.add(
                "GatherND", attended, index, name=f"{name}.attended_rows", dtype=element_type(attended), shape=None
            )
            graph.insert_before(masked.outputs[0], behind.nodes)
            run_on_rows(masked.outputs, attended, attended_rows, (count,))
        scatter = TaggedNodes(type(self).__name__, layer.index)
        _close(graph, masked, scatter, stream, index, masked.kept, f"{name}.added_rows")

    def _index(self, graph: ir.Graph, masked: MaskedBlock, before: ir.Node) -> ir.Value:
        """Where the active tokens are, int64 [count, 2]: once per layer, whatever of it is routed."""
        layer, int64, count = masked.layer.index, ir.DataType.INT64, _count(masked)
        router, tags = router_path(layer), TaggedNodes(type(self).__name__, layer).tags
        nonzero = shared_node(
            graph,
            "NonZero",
            masked.active,
            name=f"{router}.nonzero",
            tags=tags,
            dtype=int64,
            shape=(2, count),
            before=before,
        )
        return shared_node(
            graph,
            "Transpose",
            nonzero,
            name=f"{router}.index",
            tags=tags,
            dtype=int64,
            shape=(count, 2),
            before=before,
            perm=(1, 0),
        )

    def _scatter(
        self, graph: ir.Graph, masked: MaskedAttention, rows: ir.Value, on_rows: Sequence[ir.Node], index: ir.Value
    ) -> ir.Value:
        """Gives rows back their places among all tokens, for whoever reads them and does not run on rows itself."""
        width, dtype, producer = _width(rows), element_type(rows), rows.producer()
        assert width is not None, "asked by attention_problems"
        assert dtype is not None, "asked by attention_problems"
        assert producer is not None, "one of those on rows"
        readers = [use for use in rows.uses() if use.node not in on_rows]
        zeros = token_zeros(graph, type(self).__name__, width, dtype, producer)
        new = TaggedNodes(type(self).__name__, masked.layer.index)
        shape = (*masked.layer.token_dims, width)
        placed = new.add("ScatterND", zeros, index, rows, name=f"{rows.name}.all_tokens", dtype=dtype, shape=shape)
        graph.insert_after(producer, new.nodes)
        for use in readers:
            use.node.replace_input_with(use.idx, placed)
        return placed


def _close(
    graph: ir.Graph,
    masked: MaskedBlock,
    scatter: TaggedNodes,
    stream: ir.Value,
    index: ir.Value,
    kept: ir.Value,
    name: str,
) -> None:
    """Adds rows to the stream in place of the block's addition."""
    block = masked.layer.attention if isinstance(masked, MaskedAttention) else masked.layer.mlp
    total = scatter.add(
        "ScatterND",
        stream,
        index,
        kept,
        name=block.stream_out.name or name,
        dtype=element_type(block.stream_operand),
        shape=block.stream_out.shape,
        closes=2,
        reduction="add",
    )
    graph.insert_before(block.add, scatter.nodes)
    replace_value(block.stream_out, total)
    remove_with_sources(graph, block.add)


def _count(masked: MaskedBlock) -> str:
    return f"active_tokens_{masked.layer.index}"


def _boundary(masked: MaskedAttention, rows_of: Sequence[ir.Node]) -> list[ir.Value]:
    """Values of the projections that somebody reads who does not run on rows."""
    computed = [value for node in rows_of for value in node.outputs]
    return [value for value in computed if any(user not in rows_of for user in value.consumers())]


def _width(value: ir.Value) -> int | None:
    """Size of the last axis of a projection: as declared, or as its matrix or bias says."""
    if value.shape is not None and isinstance(last := value.shape[-1], int):
        return last
    node = value.producer()
    if not is_op(node, "MatMul", "Add"):
        return None
    tensors = [constant_tensor(operand) for operand in node.inputs]  # type: ignore[union-attr]  # is_op
    sizes = [int(tensor.shape[-1]) for tensor in tensors if tensor is not None and len(tensor.shape)]  # type: ignore[arg-type]  # tensors have no symbolic dimensions
    return max(sizes, default=None)


def _unrotated(value: ir.Value) -> ir.Value:
    """What rotary embedding was given: where that is zero, so is the value."""
    node = value.producer()
    while is_op(node, "RotaryEmbedding"):
        value = node.inputs[0]  # type: ignore[union-attr,assignment]  # is_op, and it has an input
        node = value.producer()
    return value


RECORD = LoweringRecord(
    name="compact",
    targets=ONNXRUNTIME,
    make_pass=lambda workload: LowerSkipToCompactionPass(),
    stage=lowered_stage(LowerSkipToCompactionPass.__name__),
    skips="tokens",
    not_capturable="the number of active tokens is read back by the host",
    reason="compaction skips work in prefill, batches and decode alike on ONNX Runtime's CPU kernels",
    suits=lambda workload: True,
    routing=("mlp", "layer"),
    operators=("ScatterND(add)",),
)
