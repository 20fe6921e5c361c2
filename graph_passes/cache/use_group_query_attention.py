"""Give attention a KV cache that is written in place at a fixed address: ONNX Runtime's own operator."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import (
    ATTENTION_MASK,
    POSITION_IDS,
    continuation_of,
    is_state_input,
    parse_past,
)
from dlo_export.graph_passes.cache.active_slots import HiddenSlots
from dlo_export.graph_passes.cache.attention_cache import CachedAttention, cached_attentions
from dlo_export.graph_passes.cache.rotary_tables import (
    rotary_tables,
    rotated_by_the_graph,
    rotations_of,
)
from dlo_export.graph_passes.cache.slot_tables import SlotTables
from dlo_export.graph_passes.cache.step_lengths import StepLengths
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import is_op, producer_of, subgraphs_of
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.rewriting import remove_unused, replace_value
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, layer_of, shared_constant

_HEAD_MULTIPLE = 8  # of head_dim, which the operator asks for
_ROTATED_MULTIPLE = 16  # likewise where it rotates
_BIAS = 10  # input of the operator


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
    allocated, read back or laid out anew in a step, so a CUDA graph captures it.

    Where tokens skip attention, as its masked form and `LowerSkipToIfPass` have it:

    * who was active is one more state, whose slots hide skipped tokens by the operator's `attention_bias`
      (`HiddenSlots`), zeros [1, 1, sequence, 1] where everybody is seen; it has a column for each token of the longest
      sequence, ReduceMax(kv_lengths), which takes the place of max_cache;
    * the branch of a skipped step writes what it leaves in place, too, since both are one buffer::

          pk          = TensorScatter(past_key, left, kv_lengths - sequence)   # of Concat(past_key, left)

    * keys that the graph must rotate itself, since zeros are put in their place or that branch reads them, it rotates
      by the same tables' rows of the step's slots (do_rotary = 0); heads that the operator does not rotate likewise,
      but for a graph that is captured, whose slots are not to be counted in every step::

          positions     = kv_lengths - sequence + [0, 1, …]                      # [batch, sequence]
          k             = RotaryEmbedding(k, Gather(cos_table, positions), Gather(sin_table, positions))

    Scope: main graph, and the branches of its Ifs. Source: ONNX Runtime's contrib operators; what has its kernels
    stands in docs/OperatorKernels.md there: float32 and float16 on a CPU, float16 and bfloat16 on a GPU.

    Attributes:
        max_cache: Slots per sequence.
        captured: Refuse what a CUDA graph could not capture.
    """

    max_cache: int
    captured: bool = False
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
        layers = collections.defaultdict[str, list[int]](list)
        for attention in cached_attentions(model.graph, self._name):
            multiple = _ROTATED_MULTIPLE if self.captured else _HEAD_MULTIPLE
            if attention.head_dim % multiple:
                reason = f"has heads of {attention.head_dim}, expected a multiple of {multiple}"
                layers[reason].append(attention.layer)
            found = rotary_tables(attention, self.max_cache)
            if isinstance(found, str):
                layers[found].append(attention.layer)
        # What is wrong with one layer mostly is with all.
        problems += [f"attention of layers {', '.join(map(str, each))}: {reason}" for reason, each in layers.items()]
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
        lengths = StepLengths(graph, self._name)
        hidden = [slots for each in attentions if (slots := HiddenSlots.of(graph, each)) is not None]
        for slots in hidden:
            bias = lengths.open_bias(slots.attention.dtype)
            first, filled = lengths.write_indices(), lengths.filled()
            slots.write_in_place(graph, self._name, first, self.max_cache, bias, filled)
        biases = {slots.attention: slots.hide.outputs[0] for slots in hidden}
        tables = SlotTables(graph, self.max_cache)
        for attention in attentions:
            self._rewrite(graph, attention, lengths, tables, biases.get(attention))
        self._write_in_branches(graph, lengths)
        for branch in _branches(graph):
            remove_unused(branch)
        remove_unused(graph)
        lengths.place()
        self._state_shapes(graph)
        first_cache = next(i for i, value in enumerate(graph.inputs) if is_state_input(value.name or ""))
        graph.inputs[first_cache:first_cache] = [lengths.kv_lengths]
        gone = {ATTENTION_MASK, POSITION_IDS}
        graph.inputs[:] = [value for value in graph.inputs if value.name not in gone]
        return True

    def _rewrite(
        self,
        graph: ir.Graph,
        attention: CachedAttention,
        lengths: StepLengths,
        slot_tables: SlotTables,
        bias: ir.Value | None,
    ) -> None:
        rotary, operands = rotary_tables(attention, self.max_cache), _query_key_value(attention)
        assert not isinstance(rotary, str), "asked by check"
        tables = [] if rotary is None else slot_tables.of(rotary, attention.dtype)
        if self._rotates_itself(attention):
            operands = [attention.operand(index) for index in range(3)]
            rows = [lengths.rows_of(table) for table in tables]
            for rotation in rotations_of(attention) if rows else ():
                assert rotation is not None, "by tables, as they say"
                for number, row in enumerate(rows, start=1):
                    rotation.replace_input_with(number, row)
            tables = []
        # A bias has as many columns as the operator is told of tokens: all slots may be many times as many.
        slots = np.array(self.max_cache, np.int32)
        total = shared_constant(graph, "model.cache_slots", slots) if bias is None else lengths.total()
        past = (attention.operand(4), attention.operand(5))
        inputs = [*operands, *past, lengths.past(), total, *tables]
        if bias is not None:
            inputs += [*[None] * (_BIAS - len(inputs)), bias]

        node = attention.node
        scale: dict[str, Any] = {"scale": node.attributes["scale"].as_float()} if "scale" in node.attributes else {}
        new = ir.node(
            "GroupQueryAttention",
            inputs,
            {
                "num_heads": attention.query_heads,
                "kv_num_heads": attention.kv_heads,
                "do_rotary": int(bool(tables)),
                **scale,
            },
            domain=MICROSOFT,
            num_outputs=3,
            name=f"{attention.name}.group_query_attention",
            metadata_props=TaggedNodes(self._name, attention.layer).tags,
        )
        assert node.graph is not None, "it was found in one"
        node.graph.insert_before(node, new)
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.type, value.shape = old.type, old.shape
            replace_value(old, value)
        node.graph.remove(node, safe=True)

    def _rotates_itself(self, attention: CachedAttention) -> bool:
        """Whether the graph goes on rotating queries and keys."""
        too_narrow = attention.head_dim % _ROTATED_MULTIPLE != 0 and not self.captured
        return too_narrow or rotated_by_the_graph(attention)

    def _write_in_branches(self, graph: ir.Graph, lengths: StepLengths) -> None:
        """Writes what steps leave that skip attention where `LowerSkipToIfPass` has them append it."""
        for branch in _branches(graph):
            for node in [node for node in branch if is_op(node, "Concat")]:
                past, left = node.inputs[0], node.inputs[1]
                if past is None or left is None or parse_past(past.name) is None:
                    continue
                old, new = node.outputs[0], TaggedNodes(self._name, layer_of(node))
                written = new.add(
                    "TensorScatter",
                    past,
                    left,
                    lengths.write_indices(),
                    name=f"{old.name}.written",
                    dtype=old.dtype,
                    shape=old.shape,
                    axis=2,
                )
                branch.insert_before(node, new.nodes)
                replace_value(old, written)
                branch.remove(node, safe=True)

    def _state_shapes(self, graph: ir.Graph) -> None:
        """Says of keys and values, in and out, that they have all slots."""
        present = {value.name: value for value in graph.outputs}
        for past in graph.inputs:
            if parse_past(past.name) is None:
                continue
            assert past.shape is not None, "asked by cached_attentions"
            shape = ir.Shape(("batch", past.shape[1], self.max_cache, past.shape[3]))
            going_on = present[continuation_of(past.name or "")]
            for value in (past, going_on, *_given_by_branches(going_on)):
                value.shape = shape.copy()


def _branches(graph: ir.Graph) -> list[ir.Graph]:
    """Of the main graph's Ifs."""
    return [branch for node in graph for branch in subgraphs_of(node)]


def _given_by_branches(value: ir.Value) -> list[ir.Value]:
    """What branches give out as this output of their If; none where it is another operator's."""
    node = producer_of(value)
    if node is None:
        return []
    number = list(node.outputs).index(value)
    return [branch.outputs[number] for branch in subgraphs_of(node)]


def _query_key_value(attention: CachedAttention) -> list[ir.Value | None]:
    """The operator's first three inputs before rotation: one value that holds all three, where a Split cut it."""
    operands = [attention.operand(index) for index in range(3)]
    rotated = [*rotations_of(attention), None]
    parts = [value if node is None else node.inputs[0] for node, value in zip(rotated, operands, strict=True)]
    split = producer_of(parts[0])
    if is_op(split, "Split") and list(split.outputs) == parts:
        return [split.inputs[0], None, None]
    return parts
