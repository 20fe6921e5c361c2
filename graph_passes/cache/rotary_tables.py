"""The tables of cosines and sines that an attention's queries and keys are rotated by."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import POSITION_IDS
from dlo_export.graph_passes.cache.attention_cache import CachedAttention
from dlo_export.graph_passes.find.data_flow import behind, constant_scalar, constant_tensor, is_op, producer_of


def rotations_of(attention: CachedAttention) -> list[ir.Node | None]:
    """The nodes that rotate its query and its key by tables; None where there is none."""
    return [_rotation(value) for value in _query_and_key(attention)]


def rotated_by_the_graph(attention: CachedAttention) -> bool:
    """Whether no operator can rotate its keys: zeros take the place of some, or others read them rotated, too."""
    rotation = _rotation(attention.operand(1))
    return is_op(attention.operand(1).producer(), "Where") or (
        rotation is not None and len(rotation.outputs[0].consumers()) > 1
    )


def _query_and_key(attention: CachedAttention) -> list[ir.Value | None]:
    """What attention is given of both, where tokens leave some."""
    query, key = attention.operand(0), attention.operand(1)
    zeroed = key.producer()
    return [query, zeroed.inputs[1] if zeroed is not None and is_op(zeroed, "Where") else key]


def _rotation(value: ir.Value | None) -> ir.Node | None:
    node = producer_of(value)
    return node if is_op(node, "RotaryEmbedding") and len(node.inputs) == 3 else None


@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """What cosines and sines are computed from.

    Attributes:
        frequencies: What a position is multiplied by, float32 [head_dim / 2].
        factor: What both tables are multiplied by, float32: YaRN's, else 1.
    """

    frequencies: np.ndarray
    factor: np.float32


def rotary_tables(attention: CachedAttention, max_cache: int) -> RotaryTables | str | None:
    """Of the tables that queries and keys are rotated by; None where neither is; in words, why it is done otherwise.

    Args:
        attention: Rotated by frequencies that are constants, or change behind a context of some tokens (dynamic,
            longrope): a step that no cache holds so many tokens for never comes there.
        max_cache: Tokens of a sequence at most.
    """
    query, key = rotations_of(attention)
    if query is None and key is None and all(map(_is_projected, _query_and_key(attention))):
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
    if (changing := next(filter(None, map(_changing_frequencies, factors)), None)) is not None:
        if max_cache > changing.context:
            return (
                f"its frequencies change for whole steps behind {changing.context} tokens (dynamic, longrope): a cache "
                f"of as many slots can be had, not of {max_cache}"
            )
        factors = [changing.before if value is changing.value else value for value in factors]
    tensors = [constant_tensor(value) for value in factors]
    constants = [tensor for tensor in tensors if tensor is not None and tensor.size == attention.head_dim // 2]
    positions = any(map(_are_positions, factors))
    if len(constants) != 1 or not positions:
        return f"its tables are not cosine and sine of {POSITION_IDS} times {attention.head_dim // 2} constants"
    return RotaryTables(np.asarray(constants[0].numpy(), np.float32).reshape(-1), np.float32(factor))


@dataclasses.dataclass(frozen=True)
class _ChangingFrequencies:
    """Frequencies that a step has by how far it reaches.

    Attributes:
        value: Those of the step.
        before: Those of steps that reach no further than the context.
        context: Tokens.
    """

    value: ir.Value
    before: ir.Value | None
    context: int


def _changing_frequencies(value: ir.Value | None) -> _ChangingFrequencies | None:
    """Of Where(length > context, …, before), length being one more than the last of all positions."""
    chosen = producer_of(value)
    beyond = producer_of(chosen.inputs[0]) if is_op(chosen, "Where") else None
    if value is None or chosen is None or not is_op(beyond, "Greater"):
        return None
    length, context = producer_of(beyond.inputs[0]), constant_scalar(beyond.inputs[1])
    last = producer_of(length.inputs[0]) if is_op(length, "Add") else None
    if context is None or not is_op(last, "ReduceMax") or not _are_positions(last.inputs[0]):
        return None
    return _ChangingFrequencies(value, chosen.inputs[2], int(context))


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
    """Whether a query or key comes of a product as it is: biased, normed, cut, or its rows put in their places."""
    source = behind(value, *_BEHIND_PRODUCTS)
    rows = producer_of(source)
    if is_op(rows, "ScatterND"):
        source = behind(rows.inputs[2], *_BEHIND_PRODUCTS)
    return is_op(producer_of(source), "MatMul")


_BEHIND_PRODUCTS = ("Split", "Add", "Reshape", "RMSNormalization")
_OTHER = ("interleaved", "rotary_embedding_dim")


def _are_positions(value: ir.Value | None) -> bool:
    source = behind(value, "Unsqueeze", "Cast")
    return source is not None and source.is_graph_input() and source.name == POSITION_IDS
