"""Let attention read one additive mask that says all there is to say: who is padding, and who comes later."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import INPUT_IDS
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_MASK, _PAST_KEY = 3, 4  # inputs of an Attention node
_NAME = "model.full_mask"


@dataclasses.dataclass(frozen=True)
class UseFullMaskPass(GraphPass):
    """Write out what `is_causal` and a mask of bool say.

    Before::

        a, pk, pv = Attention <is_causal=1> (q, k, v, mask, past_key, past_value)    # mask: bool, or none

    After::

        keys    = Range(0, total, 1)                                    # total: past + sequence
        queries = Unsqueeze(Range(total − sequence, total, 1), 1)
        seen    = And(mask, LessOrEqual(keys, queries))
        bias    = Where(seen, 0, lowest)                                # [batch, 1, sequence, total]
        a, pk, pv = Attention (q, k, v, bias, past_key, past_value)

    Where tokens skip attention they are hidden from the others by such a mask, which they are added to. All layers with
    one mask share what is made of it. As our own masks have it, nobody is hidden by −∞: a token that sees nobody must
    stay a number. Additive masks stay as they are but for the later tokens.

    Optional: what is no Attention with past inputs, or reads its keys' lengths, is left alone, as is a full additive
    mask. Scope: main graph.
    Source: ONNX Attention-23 and -24; a step's first query comes behind the cached keys, as ONNX Runtime has it.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (InjectLayersPass,)
    nodes_from: ClassVar[Border | None] = "injected"

    def rewrite(self, model: ir.Model) -> bool:
        """Give every attention its mask."""
        graph, made = model.graph, dict[tuple[ir.Value | None, bool, ir.DataType], ir.Value]()
        tokens = next((value for value in graph.inputs if value.name == INPUT_IDS), None)
        for node in list(graph) if tokens is not None else ():
            dtype = _mask_type(node)
            if tokens is None or dtype is None:
                continue
            mask, causal = node.inputs[_MASK], bool(node.attributes.get_int("is_causal", 0))
            if (mask, causal, dtype) not in made:
                new = TaggedNodes(self._name, None)
                seen = _not_later(graph, new, tokens, node.inputs[_PAST_KEY]) if causal else None
                made[mask, causal, dtype] = _additive(graph, new, mask, seen, dtype)
                graph.insert_before(node, new.nodes)
            node.replace_input_with(_MASK, made[mask, causal, dtype])
            node.attributes.pop("is_causal", None)
        return bool(made)


def _mask_type(node: ir.Node) -> ir.DataType | None:
    """The type of the additive mask an attention is to get.

    None where it is to get none: it is no attention to a cache of its own with heads side by side, or its mask says
    everything already, or is of a type that is not known to be right. What rewrites attention says so then.
    """
    if not is_op(node, "Attention") or len(node.inputs) != _PAST_KEY + 2 or "q_num_heads" not in node.attributes:
        return None
    mask, past_key = node.inputs[_MASK], node.inputs[_PAST_KEY]
    dtype = None if past_key is None else element_type(past_key)
    of_bool = mask is not None and mask.dtype == ir.DataType.BOOL
    if not of_bool and not node.attributes.get_int("is_causal", 0):
        return None
    return dtype if mask is None or of_bool or mask.dtype == dtype else None


def _additive(
    graph: ir.Graph, new: TaggedNodes, mask: ir.Value | None, seen: ir.Value | None, dtype: ir.DataType
) -> ir.Value:
    """One mask of two: [batch, 1, sequence, total], or what broadcasts to that.

    Args:
        graph: Holds the attention.
        new: Takes the nodes.
        mask: Of bool or additive; None where there is none.
        seen: bool, which is to be said besides; None where it is nothing.
        dtype: Of the result.
    """
    zero, lowest = (
        shared_constant(graph, f"{_NAME}.{name}_{dtype.name.lower()}", np.array(number, dtype.numpy()))
        for name, number in (("zero", 0.0), ("lowest", float(dtype.min)))
    )
    kept = zero
    if mask is not None and mask.dtype != ir.DataType.BOOL:
        kept = mask
    elif mask is not None and seen is not None:
        seen = new.add("And", mask, seen, name=f"{_NAME}.seen", dtype=ir.DataType.BOOL, shape=None)
    elif mask is not None:
        seen = mask
    assert seen is not None, "an additive mask that says everything is left alone"
    return new.add("Where", seen, kept, lowest, name=f"{_NAME}.bias", dtype=dtype, shape=None)


def _not_later(graph: ir.Graph, new: TaggedNodes, tokens: ir.Value, past_key: ir.Value | None) -> ir.Value:
    """Which keys are no later than each of a step's queries: bool [sequence, total]."""
    assert past_key is not None, "its type was asked for"
    int64 = ir.DataType.INT64

    def constant(name: str, values: int | list[int]) -> ir.Value:
        return shared_constant(graph, f"{_NAME}.{name}", np.array(values, np.int64))

    def size(value: ir.Value, axis: int, name: str) -> ir.Value:
        """One dimension, 0-D."""
        index = constant(f"{name}_axis", axis)
        shape = new.add("Shape", value, name=f"{_NAME}.{name}_shape", dtype=int64, shape=None)
        return new.add("Gather", shape, index, name=f"{_NAME}.{name}", dtype=int64, shape=())

    zero, one, column = constant("first", 0), constant("step", 1), constant("column", [1])
    # Of the ids, not of the query: what is computed in a layer serves that layer alone.
    sequence, past = size(tokens, 1, "sequence"), size(past_key, 2, "past")
    total = new.add("Add", past, sequence, name=f"{_NAME}.total", dtype=int64, shape=())
    first = new.add("Sub", total, sequence, name=f"{_NAME}.first_query", dtype=int64, shape=())
    keys = new.add("Range", zero, total, one, name=f"{_NAME}.keys", dtype=int64, shape=None)
    queries = new.add("Range", first, total, one, name=f"{_NAME}.queries", dtype=int64, shape=None)
    rows = new.add("Unsqueeze", queries, column, name=f"{_NAME}.query_rows", dtype=int64, shape=None)
    return new.add("LessOrEqual", keys, rows, name=f"{_NAME}.not_later", dtype=ir.DataType.BOOL, shape=None)
