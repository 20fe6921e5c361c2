"""A handmade routed decoder of two layers, with a growing or with a static cache, of the same weights."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, POSITIONS = 37, 16, 4, 2, 4, 2, 64
MAX_CACHE = 24

_VISIBLE = {
    "growing": """
    total_length = Shape <start = 1, end = 2> (attention_mask)
    step_length = Shape <start = 1, end = 2> (input_ids)
    total = Squeeze (total_length)
    step = Squeeze (step_length)
    past = Sub (total, step)
    keys = Range (zero, total, one)
    queries = Range (past, total, one)
    queries_column = Unsqueeze (queries, minus_one)
    causal = LessOrEqual (keys, queries_column)
    real = Cast <to = 9> (attention_mask)
    real_keys = Unsqueeze (real, one_two)
    visible = And (causal, real_keys)""",
    "static": """
    slots = Range (zero, max_cache, one)
    step_length = Shape <start = 1, end = 2> (input_ids)
    step = Squeeze (step_length)
    columns = Range (zero, step, one)
    first_slot = Unsqueeze (write_indices, one_axis)
    own_slots = Add (first_slot, columns)
    own_column = Unsqueeze (own_slots, one_three)
    causal = LessOrEqual (slots, own_column)
    lengths = Unsqueeze (kv_lengths, one_two_three)
    filled = Less (slots, lengths)
    visible = And (causal, filled)""",
}
_EMBEDDED = """
    mask = Where (visible, nothing, hide)
    token_rows = Gather (tokens, input_ids)
    place_rows = Gather (places, position_ids)
    embedded = Add (token_rows, place_rows)
"""


def decoder(
    cache: Literal["growing", "static"], *, force: bool = False, scores: bool = True, last_logits: bool = False
) -> bytes:
    """The serialized decoder.

    Args:
        cache: Of which kind.
        force: Take decisions from `force_active.{l}` inputs.
        scores: Give out `router_scores.{l}` and `hidden.{l}`.
        last_logits: Keep the last real token's logits; static cache only.
    """
    rng = np.random.default_rng(0)
    length = "total" if cache == "growing" else MAX_CACHE
    past = "past" if cache == "growing" else MAX_CACHE
    names = ["attention_mask"] if cache == "growing" else ["write_indices", "kv_lengths"]
    shapes = {"attention_mask": "batch, total", "write_indices": "batch", "kv_lengths": "batch"}
    inputs = ["int64[batch, sequence] input_ids", "int64[batch, sequence] position_ids"]
    inputs += [f"int64[{shapes[name]}] {name}" for name in names]
    outputs = [f"float[batch, {1 if last_logits else 'sequence'}, {VOCAB}] logits"]
    nodes = [_VISIBLE[cache], _EMBEDDED]
    weights = {
        "tokens": rng.standard_normal((VOCAB, HIDDEN)),
        "places": rng.standard_normal((POSITIONS, HIDDEN)),
        "head": rng.standard_normal((HIDDEN, VOCAB)),
    }
    for layer in range(LAYERS):
        for part in ("key", "value"):
            inputs.append(f"float[batch, {KV_HEADS}, {past}, {HEAD_DIM}] past_key_values.{layer}.{part}")
            outputs.append(f"float[batch, {KV_HEADS}, {length}, {HEAD_DIM}] present.{layer}.{part}")
        if force:
            inputs.append(f"bool[batch, sequence] force_active.{layer}")
        if scores:
            outputs += [
                f"float[batch, sequence] router_scores.{layer}",
                f"float[batch, sequence, {HIDDEN}] hidden.{layer}",
            ]
        nodes.append(_layer_nodes(layer, cache, force))
        weights |= {
            f"q{layer}": rng.standard_normal((HIDDEN, HEADS * HEAD_DIM)) / 4,
            f"k{layer}": rng.standard_normal((HIDDEN, KV_HEADS * HEAD_DIM)) / 4,
            f"v{layer}": rng.standard_normal((HIDDEN, KV_HEADS * HEAD_DIM)) / 4,
            f"o{layer}": rng.standard_normal((HEADS * HEAD_DIM, HIDDEN)) / 4,
            f"up{layer}": rng.standard_normal((HIDDEN, HIDDEN)) / 4,
            f"router{layer}": rng.standard_normal(HIDDEN) / 4,
        }
    nodes.append(_head_nodes(last_logits))
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        decoder ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {"".join(nodes)} }}"""
    quoted = re.sub(r"[a-z_]\w*(\.\w+)+", lambda name: f'"{name[0]}"', text.replace("hidden.-1", "embedded"))
    model = onnx.parser.parse_model(quoted)
    constants = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "max_cache": np.int64(MAX_CACHE),
        "one_axis": np.array([1]),
        "minus_one": np.array([-1]),
        "one_two": np.array([1, 2]),
        "one_three": np.array([1, 3]),
        "one_two_three": np.array([1, 2, 3]),
        "split_heads": np.array([0, 0, -1, HEAD_DIM]),
        "join_heads": np.array([0, 0, HEADS * HEAD_DIM]),
        "half": np.float32(0.5),
        "nothing": np.float32(0),
        "hide": np.float32(np.finfo(np.float32).min),
    }
    used = {name for node in model.graph.node for name in node.input}
    for name, value in (weights | constants).items():
        if name in used:
            array = np.asarray(value, np.float32) if name in weights else np.asarray(value)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def rename_dimension(model: bytes, name: str, axis: int, size: int) -> bytes:
    """The same graph with one dimension of an input or output declared otherwise."""
    proto = onnx.load_from_string(model)
    value = next(value for value in [*proto.graph.input, *proto.graph.output] if value.name == name)
    value.CopyFrom(
        helper.make_tensor_value_info(
            name,
            value.type.tensor_type.elem_type,
            [size if i == axis else d.dim_value or d.dim_param for i, d in enumerate(value.type.tensor_type.shape.dim)],
        )
    )
    return proto.SerializeToString()


def _layer_nodes(layer: int, cache: str, force: bool) -> str:
    x, n = f"hidden.{layer - 1}", layer
    grow = {
        "growing": "Concat <axis = 2> (past_key_values.{n}.{part}, {part}{n})",
        "static": "TensorScatter <axis = 2> (past_key_values.{n}.{part}, {part}{n}, write_indices)",
    }[cache]
    heads = "".join(
        f"""
    {name}{n}_flat = MatMul ({x}, {weight}{n})
    {name}{n}_split = Reshape ({name}{n}_flat, split_heads)
    {name}{n} = Transpose <perm = [0, 2, 1, 3]> ({name}{n}_split)"""
        for name, weight in (("query", "q"), ("key", "k"), ("value", "v"))
    )
    decision = f"force_active.{n}" if force else f"decided{n}"
    return f"""{heads}
    present.{n}.key = {grow.format(n=n, part="key")}
    present.{n}.value = {grow.format(n=n, part="value")}
    attended{n} = Attention (query{n}, present.{n}.key, present.{n}.value, mask)
    turned{n} = Transpose <perm = [0, 2, 1, 3]> (attended{n})
    joined{n} = Reshape (turned{n}, join_heads)
    branch{n} = MatMul (joined{n}, o{n})
    h{n} = Add ({x}, branch{n})
    router{n}_logits = MatMul ({x}, router{n})
    router_scores.{n} = Sigmoid (router{n}_logits)
    decided{n} = Greater (router_scores.{n}, half)
    active{n} = Unsqueeze ({decision}, minus_one)
    mlp{n} = MatMul (h{n}, up{n})
    bent{n} = Tanh (mlp{n})
    masked{n} = Where (active{n}, bent{n}, nothing)
    hidden.{n} = Add (h{n}, masked{n})
"""


def _head_nodes(last_logits: bool) -> str:
    last = f"hidden.{LAYERS - 1}"
    if not last_logits:
        return f"logits = MatMul ({last}, head)"
    return f"""
    step_lengths = Sub (kv_lengths, write_indices)
    last_columns = Sub (step_lengths, one)
    last_index = Unsqueeze (last_columns, minus_one)
    last_rows = GatherND <batch_dims = 1> ({last}, last_index)
    last_rows_3d = Unsqueeze (last_rows, one_axis)
    logits = MatMul (last_rows_3d, head)
"""
