"""Cosines and sines of the rotary embedding, computed in the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.rope import RopeConfig
from dlo_export.exporter.plain_graph.graph_builder import GraphBuilder

_NAME = "model.rotary_emb"
_FLOAT = ir.DataType.FLOAT


def rotary_tables(
    builder: GraphBuilder, rope: RopeConfig, head_dim: int, position_ids: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Cos and sin of every token's angles, float32 [batch, sequence, head_dim / 2], once per step.

    Computed rather than looked up: no table bounds the context length, and none is stored.

    Args:
        builder: Of the graph.
        rope: How angles follow from positions.
        head_dim: Of queries and keys.
        position_ids: int64 [batch, sequence].
    """
    positions = builder.op("Cast", [position_ids], f"{_NAME}.positions", to=int(_FLOAT), dtype=_FLOAT)
    column = builder.op("Unsqueeze", [positions, builder.constant("axes.last", np.array([2]))], f"{_NAME}.column")
    angles = builder.op("Mul", [column, _frequencies(builder, rope, head_dim, position_ids)], f"{_NAME}.angles")
    tables = [builder.op(function, [angles], f"{_NAME}.{function.lower()}") for function in ("Cos", "Sin")]
    if rope.attention_factor != 1:
        factor = builder.constant(f"{_NAME}.attention_factor", np.float32(rope.attention_factor))
        tables = [builder.op("Mul", [table, factor], f"{table.name}_scaled") for table in tables]
    return tables[0], tables[1]


def _frequencies(builder: GraphBuilder, rope: RopeConfig, head_dim: int, position_ids: ir.Value) -> ir.Value:
    """Radians per token of each pair, float32 [head_dim / 2]: constant, or of this step by how far it reaches."""
    frequencies = builder.constant(f"{_NAME}.inv_freq", rope.inverse_frequencies(head_dim))
    if not rope.depends_on_length:
        return frequencies
    # As transformers counts: the longest sequence of the batch, this step's tokens included.
    last = builder.op("ReduceMax", [position_ids], f"{_NAME}.last_position", keepdims=0)
    length = builder.op("Add", [last, builder.constant("one", np.int64(1))], f"{_NAME}.length")
    original = builder.constant(f"{_NAME}.original_length", np.int64(rope.original_max_position))
    beyond = builder.op("Greater", [length, original], f"{_NAME}.is_beyond", dtype=ir.DataType.BOOL)
    if rope.kind == "longrope":
        long = rope.inverse_frequencies(head_dim, beyond_original=True)
        step = builder.constant(f"{_NAME}.long_inv_freq", long)
    else:
        step = _dynamic_frequencies(builder, rope, head_dim, length)
    return builder.op("Where", [beyond, step, frequencies], f"{_NAME}.step_inv_freq", dtype=_FLOAT)


def _dynamic_frequencies(builder: GraphBuilder, rope: RopeConfig, head_dim: int, length: ir.Value) -> ir.Value:
    """1 / t^(2i / head_dim), t = theta · (factor·length/original − (factor − 1))^(head_dim / (head_dim − 2)).

    Args:
        builder: Of the graph.
        rope: Of kind dynamic.
        head_dim: Of queries and keys.
        length: int64 scalar; where it is less than the original length, what comes of it is not used.
    """

    def scalar(name: str, value: float) -> ir.Value:
        return builder.constant(f"{_NAME}.{name}", np.float32(value))

    tokens = builder.op("Cast", [length], f"{_NAME}.length_float", to=int(_FLOAT), dtype=_FLOAT)
    scaled = builder.op("Mul", [tokens, scalar("factor", rope.factor)], f"{_NAME}.scaled_length")
    share = builder.op("Div", [scaled, scalar("original", rope.original_max_position)], f"{_NAME}.length_share")
    growth = builder.op("Sub", [share, scalar("factor_less_one", rope.factor - 1)], f"{_NAME}.growth")
    exponent = scalar("growth_exponent", head_dim / (head_dim - 2))
    power = builder.op("Pow", [growth, exponent], f"{_NAME}.growth_power")
    theta = builder.op("Mul", [power, scalar("theta", rope.theta)], f"{_NAME}.step_theta")
    exponents = builder.constant(f"{_NAME}.exponents", rope.exponents(head_dim))
    periods = builder.op("Pow", [theta, exponents], f"{_NAME}.periods")
    return builder.op("Reciprocal", [periods], f"{_NAME}.dynamic_inv_freq")
