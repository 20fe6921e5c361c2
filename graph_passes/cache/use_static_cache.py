"""Give attention a KV cache of fixed size that is updated in place: TensorRT's interface."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import (
    ATTENTION_MASK,
    INPUT_IDS,
    KV_LENGTHS,
    POSITION_IDS,
    WRITE_INDICES,
    is_state_input,
)
from dlo_export.graph_passes.cache.active_slots import HiddenSlots
from dlo_export.graph_passes.cache.attention_cache import (
    CachedAttention,
    attend,
    cached_attentions,
    heads_first,
)
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

OPSET = 24  # TensorScatter
_MASK = "model.attention_mask"


@dataclasses.dataclass(frozen=True)
class UseStaticCachePass(GraphPass):
    """Write keys and values into cache slots, and attend over all slots under one full additive mask.

    Before::

        bias          = …attention_mask…                                # [batch, 1, sequence, past + sequence]
        y, pk, pv     = Attention(q, k, v, bias, past_key, past_value)   # q, k, v [batch, sequence, heads·dim]

    After, past and present being [batch, kv_heads, max_cache, head_dim]::

        pk            = TensorScatter(past_key, heads(k), write_indices) # and pv
        y             = tokens(Attention(heads(q), pk, pv, bias))
        bias          = Where(slot <= write_indices + token and slot < kv_lengths, 0, lowest)

    `write_indices` int64 [batch] is the slot of the step's first token, `kv_lengths` int64 [batch] how many slots hold
    real tokens after the step; they replace `attention_mask`. Batches are ragged to the right: what a shorter sequence
    writes behind its end is never seen, and overwritten by its next step. A slot that was never written must hold a
    finite number. Where a layer's state says who was active, it becomes one more cache, [batch, 1, max_cache, 1], of
    zeros and ones in the others' type, and hides the slots of skipped tokens::

        numbers        = Unsqueeze(Cast(active), [1, 3])
        present_active = TensorScatter(past_active, numbers, write_indices)
        bias           = Where(Greater(Transpose(present_active), 0), bias, lowest)

    Padding may have any position: where rotary frequencies follow from the largest one, only real tokens' count::

        last           = ReduceMax(Where(write_indices + token < kv_lengths, position_ids, 0))

    Attention is never given is_causal or nonpad_kv_seqlen, which TensorRT reads differently or drops.
    Scope: main graph. Source: ONNX TensorScatter-24, Attention-24.

    Attributes:
        max_cache: Slots per sequence.
    """

    max_cache: int
    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (InjectLayersPass, RouteLayersPass)
    nodes_from: ClassVar[Border | None] = "injected"

    def check(self, model: ir.Model) -> None:
        """There is at least one slot.

        Raises:
            GraphPassError: There is none.
        """
        del model
        if self.max_cache < 1:
            raise GraphPassError(
                f"UseStaticCachePass: max_cache is {self.max_cache}, expected at least 1.",
                hint="a sequence's tokens go into the cache: give it as many slots as a sequence may get long",
            )

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every attention.

        Raises:
            GraphPassError: There is none with a growing cache, or one cannot be rewritten; with all reasons.
        """
        graph = model.graph
        attentions = cached_attentions(graph, self._name)
        graph.opset_imports[""] = max(OPSET, graph.opset_imports[""])
        write_indices = ir.val(WRITE_INDICES, dtype=ir.DataType.INT64, shape=["batch"])
        kv_lengths = ir.val(KV_LENGTHS, dtype=ir.DataType.INT64, shape=["batch"])
        mask, tokens = self._mask(graph, attentions[0], write_indices, kv_lengths)
        moved = self._leave_padding_out(graph, attentions[0], tokens, kv_lengths)
        hidden = [slots for each in attentions if (slots := HiddenSlots.of(graph, each)) is not None]
        for slots in hidden:
            slots.write_in_place(graph, self._name, write_indices, self.max_cache, mask)
        masks = {slots.attention: slots.hide.outputs[0] for slots in hidden}
        for attention in attentions:
            self._rewrite(graph, attention, write_indices, masks.get(attention, mask))
        remove_unused(graph)
        if moved or hidden:
            graph.sort()  # what reads the slots' numbers, or the mask that all share, may stand in front of them
        # The two new inputs stand where attention_mask stood in the interface: between the tokens and the cache.
        first_cache = next(i for i, value in enumerate(graph.inputs) if is_state_input(value.name or ""))
        graph.inputs[first_cache:first_cache] = [write_indices, kv_lengths]
        graph.inputs[:] = [value for value in graph.inputs if value.name != ATTENTION_MASK]
        return True

    def _mask(
        self, graph: ir.Graph, first: CachedAttention, write_indices: ir.Value, kv_lengths: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The additive mask of all layers, [batch, 1, sequence, max_cache], put in front of the first.

        With it, the slots of the step's tokens, [batch, sequence].
        """
        new, int64, boolean = TaggedNodes(self._name, None), ir.DataType.INT64, ir.DataType.BOOL
        dtype = first.dtype

        def constant(name: str, array: np.ndarray) -> ir.Value:
            return shared_constant(graph, f"{_MASK}.{name}", array)

        # Slot s is visible to token t of a step iff s <= write_indices + t (causal) and s < kv_lengths (real). First,
        # which slot each token of the step goes into: [batch, sequence].
        input_ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
        slots = constant("slots", np.arange(self.max_cache))
        length = new.add("Shape", input_ids, name=f"{_MASK}.sequence_axis", dtype=int64, shape=(1,), start=1, end=2)
        zero, one = constant("zero", np.array(0)), constant("one", np.array(1))
        count = new.add("Squeeze", length, name=f"{_MASK}.sequence", dtype=int64, shape=())
        steps = new.add("Range", zero, count, one, name=f"{_MASK}.steps", dtype=int64, shape=("sequence",))
        axis_1 = constant("axes_1", np.array([1]))
        axes_1_2 = constant("axes_1_2", np.array([1, 2]))
        axis_2 = constant("axes_2", np.array([2]))
        starts = new.add("Unsqueeze", write_indices, axis_1, name=f"{_MASK}.starts", dtype=int64, shape=("batch", 1))
        tokens = new.add("Add", starts, steps, name=f"{_MASK}.tokens", dtype=int64, shape=("batch", "sequence"))

        # Both comparisons, of integers, over all slots: [batch, sequence, max_cache].
        shape: tuple[int | str, ...] = ("batch", "sequence", 1)
        column = new.add("Unsqueeze", tokens, axis_2, name=f"{_MASK}.token_column", dtype=int64, shape=shape)
        shape = ("batch", "sequence", self.max_cache)
        causal = new.add("LessOrEqual", slots, column, name=f"{_MASK}.causal", dtype=boolean, shape=shape)
        ends = new.add("Unsqueeze", kv_lengths, axes_1_2, name=f"{_MASK}.ends", dtype=int64, shape=("batch", 1, 1))
        real = new.add("Less", slots, ends, name=f"{_MASK}.real", dtype=boolean, shape=("batch", 1, self.max_cache))
        visible = new.add("And", causal, real, name=f"{_MASK}.visible", dtype=boolean, shape=shape)

        # One additive bias that serves all heads and all layers: 0 where visible, the lowest finite number elsewhere.
        shape = ("batch", 1, "sequence", self.max_cache)
        per_head = new.add("Unsqueeze", visible, axis_1, name=f"{_MASK}.per_head", dtype=boolean, shape=shape)
        open_ = constant("open", np.asarray(0, dtype.numpy()))
        lowest = constant("lowest", np.asarray(dtype.min, dtype.numpy()))
        bias = new.add("Where", per_head, open_, lowest, name=f"{_MASK}.static_bias", dtype=dtype, shape=shape)
        graph.insert_before(first.node, new.nodes)
        return bias, tokens

    def _leave_padding_out(
        self, graph: ir.Graph, first: CachedAttention, tokens: ir.Value, kv_lengths: ir.Value
    ) -> bool:
        """Has real tokens alone say how far a step reaches, where that is asked; returns whether it is."""
        positions = next((value for value in graph.inputs if value.name == POSITION_IDS), None)
        asking = [node for node in positions.consumers() if is_op(node, "ReduceMax")] if positions is not None else []
        if positions is None or not asking:
            return False
        new, int64, shape = TaggedNodes(self._name, None), ir.DataType.INT64, ("batch", "sequence")
        axis_1 = shared_constant(graph, f"{_MASK}.axes_1", np.array([1]))
        ends = new.add("Unsqueeze", kv_lengths, axis_1, name=f"{_MASK}.token_ends", dtype=int64, shape=("batch", 1))
        real = new.add("Less", tokens, ends, name=f"{_MASK}.real_tokens", dtype=ir.DataType.BOOL, shape=shape)
        zero = shared_constant(graph, f"{_MASK}.zero", np.array(0))
        kept = new.add("Where", real, positions, zero, name=f"{_MASK}.real_positions", dtype=int64, shape=shape)
        graph.insert_before(first.node, new.nodes)
        for node in asking:
            node.replace_input_with(0, kept)
        return True

    def _rewrite(self, graph: ir.Graph, attention: CachedAttention, write_indices: ir.Value, mask: ir.Value) -> None:
        # A step's keys and values are written into their slots, and all slots are attended over under the one mask.
        # Past and present have one fixed shape, so that a runtime may keep them in one buffer.
        new = TaggedNodes(self._name, attention.layer)
        shape = ("batch", attention.kv_heads, self.max_cache, attention.head_dim)
        present = []
        for index, part in ((1, "key"), (2, "value")):
            past, name, dtype = attention.operand(index + 3), f"{attention.name}.{part}_cache", attention.dtype
            past.shape = ir.Shape(shape)
            update = heads_first(graph, new, attention, index, part)
            present.append(
                new.add("TensorScatter", past, update, write_indices, name=name, dtype=dtype, shape=shape, axis=2)
            )
        attend(graph, new, attention, (present[0], present[1]), mask)
