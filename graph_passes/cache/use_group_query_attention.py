"""Give attention a KV cache that is written in place at a fixed address: ONNX Runtime's operator on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import ATTENTION_MASK, KV_LENGTHS, POSITION_IDS, is_state_input
from dlo_export.graph_passes.cache.attention_cache import CachedAttention, cached_attentions
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import behind, constant_scalar, constant_tensor, is_op, producer_of
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_unused, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_HEAD_MULTIPLE = 16  # of head_dim, which the operator's rotation asks for
_ROTARY = "model.rotary_emb"


@dataclasses.dataclass(frozen=True)
class UseGroupQueryAttentionPass(GraphPass):
    """Rotate, write into the cache and attend in one operator, over the slots that are filled.

    Before::

        cos, sin      = Cos(angles), Sin(angles)                        # angles = position_ids · inv_freq; · factor
        q, k, v       = Split(qkv)                                      # or three products
        y, pk, pv     = Attention(RotaryEmbedding(q, cos, sin), RotaryEmbedding(k, cos, sin), v, bias,
                                  past_key, past_value)

    After, past and present being [batch, kv_heads, max_cache, head_dim], one buffer for both::

        y, pk, pv     = com.microsoft.GroupQueryAttention <do_rotary = 1>
                            (qkv, "", "", past_key, past_value, kv_lengths - 1, max_cache, cos_table, sin_table)

    `kv_lengths` int64 [batch] is how many tokens a sequence has after the step, the step's own included; it replaces
    `attention_mask` and `position_ids`: the first token of a sequence stands in slot 0, at position 0. All tokens of a
    step are real; a step of several tokens is one of a single sequence, which is what the operator takes. Where a layer
    rotates nothing, neither does its operator (do_rotary = 0, no tables). A slot that
    was never written must hold a finite number: CUDA's kernels multiply it by 0 (measured with 1.31.1). Nothing is
    allocated, read back or laid out anew in a step, so a CUDA graph captures it. Scope: main graph. Source: ONNX
    Runtime's contrib operators; what has its kernels stands in docs/OperatorKernels.md there: float32 and float16 on a
    CPU, float16 and bfloat16 on a GPU.

    Attributes:
        max_cache: Slots per sequence.
    """

    max_cache: int
    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (
        InjectLayersPass,
        RouteLayersPass,
        LoweringPass,
        FuseSiblingMatMulsPass,
        UseStaticCachePass,
    )
    nodes_from: ClassVar[Border | None] = "injected"

    def check(self, model: ir.Model) -> None:
        """There is at least one slot, and every attention is rotated by tables of its own positions, or not at all.

        Raises:
            GraphPassError: With all reasons.
        """
        problems = [] if self.max_cache >= 1 else [f"max_cache is {self.max_cache}, expected at least 1"]
        for attention in cached_attentions(model.graph, self._name):
            if attention.head_dim % _HEAD_MULTIPLE:
                problems.append(
                    f"{place(attention.node)} has heads of {attention.head_dim}, expected a multiple of "
                    f"{_HEAD_MULTIPLE}"
                )
            found = _rotary_tables(attention)
            if isinstance(found, str):
                problems.append(f"{place(attention.node)}: {found}")
        if problems:
            raise GraphPassError(
                f"UseGroupQueryAttentionPass: {'; '.join(problems)}.",
                hint="export without a static cache for ONNX Runtime",
            )

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every attention.

        Raises:
            GraphPassError: There is none with a growing cache, or one cannot be rewritten; with all reasons.
        """
        graph = model.graph
        attentions = cached_attentions(graph, self._name)
        graph.opset_imports[MICROSOFT] = 1
        kv_lengths = ir.val(KV_LENGTHS, dtype=ir.DataType.INT64, shape=["batch"])
        past_lengths = self._past_lengths(graph, attentions[0], kv_lengths)
        for attention in attentions:
            self._rewrite(graph, attention, past_lengths)
        remove_unused(graph)
        first_cache = next(i for i, value in enumerate(graph.inputs) if is_state_input(value.name or ""))
        graph.inputs[first_cache:first_cache] = [kv_lengths]
        gone = {ATTENTION_MASK, POSITION_IDS}
        graph.inputs[:] = [value for value in graph.inputs if value.name not in gone or value.uses()]
        return True

    def _past_lengths(self, graph: ir.Graph, first: CachedAttention, kv_lengths: ir.Value) -> ir.Value:
        """The operator's int32 [batch], one less than there are tokens, put in front of the first attention."""
        new = TaggedNodes(self._name, None)
        one = shared_constant(graph, "model.kv_lengths.one", np.array(1, np.int64))
        less = new.add("Sub", kv_lengths, one, name="model.kv_lengths.less", dtype=ir.DataType.INT64, shape=("batch",))
        int32 = ir.DataType.INT32
        past = new.add("Cast", less, name="model.kv_lengths.int32", dtype=int32, shape=("batch",), to=int(int32))
        graph.insert_before(first.node, new.nodes)
        return past

    def _rewrite(self, graph: ir.Graph, attention: CachedAttention, past_lengths: ir.Value) -> None:
        rotary = _rotary_tables(attention)
        assert not isinstance(rotary, str), "asked by check"
        dtype = attention.dtype.numpy()
        tables: list[ir.Value | None] = []
        if rotary is not None:
            # In float32, as the graph computed them; a table row is a position, and a position is a slot.
            angles = np.arange(self.max_cache, dtype=np.float32)[:, np.newaxis] * rotary.frequencies.reshape(1, -1)
            for table, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
                scaled = (values * rotary.factor).astype(dtype)
                tables.append(shared_constant(graph, f"{_ROTARY}.{table}_table", scaled))
        slots = shared_constant(graph, "model.cache_slots", np.array(self.max_cache, np.int32))

        node = attention.node
        past = [attention.operand(4), attention.operand(5)]
        shape = ("batch", attention.kv_heads, self.max_cache, attention.head_dim)
        for value in past:
            value.shape = ir.Shape(shape)
        scale: dict[str, Any] = {"scale": node.attributes["scale"].as_float()} if "scale" in node.attributes else {}
        new = ir.node(
            "GroupQueryAttention",
            [*_query_key_value(attention), *past, past_lengths, slots, *tables],
            {
                "num_heads": attention.query_heads,
                "kv_num_heads": attention.kv_heads,
                "do_rotary": int(rotary is not None),
                **scale,
            },
            domain=MICROSOFT,
            num_outputs=3,
            name=f"{attention.name}.group_query_attention",
            metadata_props=TaggedNodes(self._name, attention.layer).tags,
        )
        graph.insert_before(node, new)
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.type, value.shape = old.type, old.shape
            replace_value(old, value)
        graph.remove(node, safe=True)
        for value in new.outputs[1:]:
            value.shape = ir.Shape(shape)


def _rotation(value: ir.Value) -> ir.Node | None:
    """The node that rotates a query or key by tables of cosines and sines."""
    node = value.producer()
    return node if is_op(node, "RotaryEmbedding") and len(node.inputs) == 3 else None


@dataclasses.dataclass(frozen=True)
class _RotaryTables:
    """What cosines and sines are computed from.

    Attributes:
        frequencies: What a position is multiplied by, float32 [head_dim / 2].
        factor: What both tables are multiplied by, float32: YaRN's, else 1.
    """

    frequencies: np.ndarray
    factor: np.float32


def _rotary_tables(attention: CachedAttention) -> _RotaryTables | str | None:
    """Of the tables that queries and keys are rotated by; None where neither is; in words, why it is done otherwise."""
    rotations = query, key = [_rotation(attention.operand(index)) for index in (0, 1)]
    if rotations == [None, None] and all(_is_projected(attention.operand(index)) for index in (0, 1)):
        return None
    if query is None or key is None:
        return "its query and key are not rotated by tables, each in a RotaryEmbedding of its own"
    if (problem := _form_problem(query, key)) is not None:
        return problem
    # Backwards from the tables, behind a cast: cosine and sine of one product, of positions and constants.
    scaled = [_scaled(behind(value, "Cast")) for value in query.inputs[1:]]
    (cos, factor), (sin, other) = ((producer_of(value), factor) for value, factor in scaled)
    angles = cos.inputs[0] if cos is not None and sin is not None and cos.inputs[0] is sin.inputs[0] else None
    product = producer_of(angles) if is_op(cos, "Cos") and is_op(sin, "Sin") and factor == other else None
    factors = list(product.inputs) if is_op(product, "Mul") else []
    tensors = [constant_tensor(value) for value in factors]
    constants = [tensor for tensor in tensors if tensor is not None and tensor.size == attention.head_dim // 2]
    positions = any(map(_are_positions, factors))
    if positions and tensors == [None, None]:
        return "its frequencies are computed in every step (dynamic, longrope), and its tables would be made once"
    if len(constants) != 1 or not positions:
        return f"its tables are not cosine and sine of {POSITION_IDS} times {attention.head_dim // 2} constants"
    return _RotaryTables(np.asarray(constants[0].numpy(), np.float32).reshape(-1), np.float32(factor))


def _form_problem(query: ir.Node, key: ir.Node) -> str | None:
    """Why two RotaryEmbedding nodes are none that the operator can stand for."""
    if any(node.attributes[name].value for node in (query, key) for name in _OTHER if name in node.attributes):
        return "its rotation is interleaved or partial"
    if list(query.inputs[1:]) != list(key.inputs[1:]):
        return "its query and key are rotated by different tables"
    return None


def _scaled(table: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a table is a multiple of, and by which constant; itself and 1 where it is none."""
    product = producer_of(table)
    factor = constant_scalar(product.inputs[1]) if is_op(product, "Mul") else None
    return (table, 1.0) if product is None or factor is None else (product.inputs[0], factor)


def _is_projected(value: ir.Value | None) -> bool:
    """Whether nothing but a bias, a norm and the cut of a joined product stand between a MatMul and a query or key."""
    return is_op(producer_of(behind(value, "Split", "Add", "Reshape", "RMSNormalization")), "MatMul")


_OTHER = ("interleaved", "rotary_embedding_dim")


def _are_positions(value: ir.Value | None) -> bool:
    source = behind(value, "Unsqueeze", "Cast")
    return source is not None and source.is_graph_input() and source.name == POSITION_IDS


def _query_key_value(attention: CachedAttention) -> list[ir.Value | None]:
    """The operator's first three inputs before rotation: one value that holds all three, where a Split cut it."""
    operands = [attention.operand(index) for index in range(3)]
    rotated = [_rotation(value) for value in operands[:2]]
    parts = [node.inputs[0] if node is not None else value for node, value in zip(rotated, operands, strict=False)]
    parts.append(operands[2])
    split = producer_of(parts[0])
    if is_op(split, "Split") and list(split.outputs) == parts:
        return [split.inputs[0], None, None]
    return list(parts)
