"""Keep who was active in the slots of a cache of fixed size, and hide the slots of those who were not."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import past_active_name
from dlo_export.checkpoints.llama_layer import router_path
from dlo_export.graph_passes.cache.attention_cache import CachedAttention
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_MASK = "model.attention_mask"


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenSlots:
    """The state of activity of a layer, and where attention is told of it.

    Attributes:
        attention: Of the layer.
        past: The graph input of the state.
        state: The Concat that appends a step's decisions.
        hide: The Where that adds the lowest number to the scores of skipped tokens; in a branch where attention is.
    """

    attention: CachedAttention
    past: ir.Value
    state: ir.Node
    hide: ir.Node

    @classmethod
    def of(cls, graph: ir.Graph, attention: CachedAttention) -> HiddenSlots | None:
        """Those of a layer in the form `RouteLayersPass` writes; None where nobody is hidden there.

        Args:
            graph: The main graph.
            attention: Of the layer.
        """
        name = past_active_name(attention.layer)
        past = next((value for value in graph.inputs if value.name == name), None)
        if past is None:
            return None
        state, hide = past.consumers()[0], attention.operand(3).producer()
        assert is_op(state, "Concat"), "RouteLayersPass appends to it, and nobody else reads it"
        assert hide is not None, "RouteLayersPass masks it"
        assert is_op(hide, "Where"), "RouteLayersPass masks it"
        return cls(attention, past, state, hide)

    def write_in_place(
        self,
        graph: ir.Graph,
        made_by: str,
        write_indices: ir.Value,
        max_cache: int,
        mask: ir.Value,
        filled: ir.Value | None = None,
    ) -> None:
        """Writes decisions into the step's slots, as keys and values are written, and hides by all slots.

        Before::

            present_active = Concat(past_active, active)                       # bool [batch, past + sequence]
            bias           = Where(Unsqueeze(present_active, [1, 2]), bias, lowest)

        After, of the type of keys and values, zeros and ones::

            numbers        = Unsqueeze(Cast(active), [1, 3])
            present_active = TensorScatter(past_active, numbers, write_indices)  # [batch, 1, max_cache, 1]
            bias           = Where(Greater(Transpose(present_active), 0), mask, lowest)

        or, where `filled` is given, by Slice(present_active, 0, filled): a bias with a column per token.

        Args:
            graph: The main graph; needs sorting where `mask` stands behind the layer's decision.
            made_by: Name of the pass.
            write_indices: int64 [batch], the slot of the step's first token.
            max_cache: Slots.
            mask: Additive, [batch or 1, 1, sequence, max_cache or 1].
            filled: int64 [1], how many slots, from the first on, hold all tokens; None for all slots.
        """
        active, old, dtype = self.state.inputs[1], self.state.outputs[0], self.attention.dtype
        assert active is not None, "Concat has two inputs here"
        writing, hiding = (TaggedNodes(made_by, self.attention.layer) for _ in range(2))
        router = router_path(self.attention.layer)
        shape: tuple[int | str, ...] = ("batch", 1, max_cache, 1)
        self.past.type, self.past.shape = ir.TensorType(dtype), ir.Shape(shape)
        numbers = writing.add("Cast", active, name=f"{router}.numbers", dtype=dtype, shape=active.shape, to=int(dtype))
        axes = shared_constant(graph, f"{_MASK}.axes_1_3", np.array([1, 3]))
        rows: tuple[int | str, ...] = ("batch", 1, "sequence", 1)
        update = writing.add("Unsqueeze", numbers, axes, name=f"{router}.slot_numbers", dtype=dtype, shape=rows)
        written = writing.add(
            "TensorScatter", self.past, update, write_indices, name=f"{router}.slots", dtype=dtype, shape=shape, axis=2
        )
        graph.insert_before(self.state, writing.nodes)
        # Where attention is left out, so is what tells it whom it must not see.
        looked_at = written
        columns: int | str = max_cache if filled is None else "filled"
        if filled is not None:
            first = shared_constant(graph, f"{_MASK}.first_slot", np.array([0]))
            axis = shared_constant(graph, f"{_MASK}.slot_axis", np.array([2]))
            shape = ("batch", 1, columns, 1)
            name = f"{router}.filled_slots"
            looked_at = hiding.add("Slice", written, first, filled, axis, name=name, dtype=dtype, shape=shape)
        shape = ("batch", 1, 1, columns)
        across = hiding.add(
            "Transpose", looked_at, name=f"{router}.slots_across", dtype=dtype, shape=shape, perm=(0, 1, 3, 2)
        )
        zero = shared_constant(graph, f"{_MASK}.open", np.asarray(0, dtype.numpy()))
        seen = hiding.add("Greater", across, zero, name=f"{router}.seen", dtype=ir.DataType.BOOL, shape=shape)
        assert self.hide.graph is not None, "it stands in the main graph or in a branch"
        self.hide.graph.insert_before(self.hide, hiding.nodes)
        self.hide.replace_input_with(0, seen)
        self.hide.replace_input_with(1, mask)
        self.hide.outputs[0].shape = ir.Shape(("batch", 1, "sequence", columns))
        # What read the state was the old mask's condition, which nobody reads now; the output goes on under its name.
        replace_value(old, written)
