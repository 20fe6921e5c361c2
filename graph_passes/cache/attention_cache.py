"""Attention nodes that keep their own KV cache, and the rewriting of them that every kind of cache shares."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import INPUT_IDS, CacheName, parse_past, past_name
from dlo_export.checkpoints.llama_layer import layer_tensor_name
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant

_FORBIDDEN = ("is_causal", "qk_matmul_output_mode", "softcap", "softmax_precision")


@dataclasses.dataclass(frozen=True, eq=False)
class CachedAttention:
    """An Attention node (opset 23) with past inputs and present outputs.

    Attributes:
        node: It.
        layer: Number of its decoder layer, from the name of its cache.
        query_heads: Of the query.
        kv_heads: Of key and value.
        head_dim: Of all three.
        dtype: Of all three, and of the mask.
    """

    node: ir.Node
    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: ir.DataType

    def operand(self, index: int) -> ir.Value:
        """Query, key, value, mask, past key or past value, by number."""
        value = self.node.inputs[index]
        assert value is not None, "checked by cached_attentions"
        return value

    @property
    def name(self) -> str:
        """Prefix of the names of new nodes."""
        return layer_tensor_name(self.layer, "self_attn")


def cached_attentions(graph: ir.Graph, asking: str) -> list[CachedAttention]:
    """Every attention, of branches too, in order.

    Args:
        graph: A decoder.
        asking: Name of the pass, for messages.

    Raises:
        GraphPassError: There is none, or one is not of the form the passes rewrite; with all reasons.
    """
    # All of them are looked at before the first is rewritten: a graph is changed as a whole or not at all.
    found, problems = [], []
    for node in graph.all_nodes():
        if not is_op(node, "Attention"):
            continue
        if (problem := _problem(node)) is not None:
            problems.append(f"{place(node)}: {problem}")
            continue
        cache = _cache_name(node.inputs[4])
        assert cache is not None, "checked by _problem"
        found.append(
            CachedAttention(
                node,
                cache.layer,
                query_heads=node.attributes["q_num_heads"].as_int(),
                kv_heads=node.attributes["kv_num_heads"].as_int(),
                head_dim=_head_dim(node.inputs[4]),
                dtype=_dtype(node.inputs[4]),
            )
        )
    # The mask of a static cache counts a step's tokens by their ids.
    if INPUT_IDS not in {value.name for value in graph.inputs}:
        problems.append(f"the graph has no input '{INPUT_IDS}'")
    if not found and not any(is_op(node, "Attention") for node in graph.all_nodes()):
        problems.append("the graph has no Attention node; its attention is decomposed, or another exporter's own")
    if problems:
        raise GraphPassError(
            f"{asking}: " + "; ".join(problems) + ".",
            hint="export the checkpoint itself; other exporters' graphs keep the cache they have",
        )
    return found


def _problem(node: ir.Node) -> str | None:
    """The first reason why an Attention node cannot be rewritten."""
    # The first reason is told: those behind it may only follow from it.
    problems = (
        ("has no past inputs and present outputs", _lacks_cache(node)),
        ("reads nonpad_kv_seqlen, expected a full mask", len(node.inputs) > 6),
        ("has no mask", len(node.inputs) > 3 and node.inputs[3] is None),
        (
            f"sets one of {', '.join(_FORBIDDEN)}, expected a full mask and nothing else",
            any(name in node.attributes and node.attributes[name].value for name in _FORBIDDEN),
        ),
        (
            "takes heads apart already, expected [batch, sequence, heads·head_dim] and their numbers",
            not {"q_num_heads", "kv_num_heads"} <= set(node.attributes),
        ),
        (
            f"does not read a graph input '{past_name('{i}', 'key')}' [batch, kv_heads, past, head_dim]",
            not _lacks_cache(node) and not _is_cache_input(node.inputs[4]),
        ),
    )
    return next((problem for problem, found in problems if found), None)


def _lacks_cache(node: ir.Node) -> bool:
    return len(node.inputs) < 6 or node.inputs[4] is None or node.inputs[5] is None or len(node.outputs) < 3


def _is_cache_input(key: ir.Value | None) -> bool:
    if key is None or not key.is_graph_input() or _cache_name(key) is None or key.shape is None:
        return False
    if key.dtype is None:
        return False
    return isinstance(key.shape[1], int) and isinstance(key.shape[3], int)


def _cache_name(key: ir.Value | None) -> CacheName | None:
    """What the name of a past key says; None where the value is no past key."""
    name = None if key is None else parse_past(key.name)
    return name if name is not None and name.part == "key" else None


def _dtype(key: ir.Value | None) -> ir.DataType:
    assert key is not None, "checked by _problem"
    assert key.dtype is not None, "checked by _problem"
    return key.dtype


def _head_dim(key: ir.Value | None) -> int:
    assert key is not None, "checked by _problem"
    assert key.shape is not None, "checked by _problem"
    return int(key.shape[3])  # type: ignore[arg-type]  # checked by _problem


def heads_first(graph: ir.Graph, nodes: TaggedNodes, attention: CachedAttention, index: int, part: str) -> ir.Value:
    """Query, key or value [batch, sequence, heads·dims], by its number, as [batch, heads, sequence, dims]."""
    value, dims, dtype, name = attention.operand(index), attention.head_dim, attention.dtype, f"{attention.name}.{part}"
    heads = attention.query_heads if index == 0 else attention.kv_heads
    # A 0 keeps the dimension as it is: batch and sequence stay free.
    shape = shared_constant(graph, f"model.heads_shape_{heads}x{dims}", np.array([0, 0, heads, dims], np.int64))
    apart = nodes.add(
        "Reshape", value, shape, name=f"{name}_heads", dtype=dtype, shape=("batch", "sequence", heads, dims)
    )
    return nodes.add(
        "Transpose",
        apart,
        name=f"{name}_heads_first",
        dtype=dtype,
        shape=("batch", heads, "sequence", dims),
        perm=(0, 2, 1, 3),
    )


def _tokens_first(graph: ir.Graph, nodes: TaggedNodes, attention: CachedAttention, value: ir.Value) -> ir.Value:
    """What attention computes, [batch, heads, sequence, dims], as [batch, sequence, heads·dims]."""
    width, dtype, name = attention.query_heads * attention.head_dim, attention.dtype, f"{attention.name}.attended"
    apart = nodes.add("Transpose", value, name=f"{name}_tokens_first", dtype=dtype, shape=None, perm=(0, 2, 1, 3))
    shape = shared_constant(graph, f"model.tokens_shape_{width}", np.array([0, 0, width], np.int64))
    return nodes.add("Reshape", apart, shape, name=name, dtype=dtype, shape=("batch", "sequence", width))


def attend(
    graph: ir.Graph, nodes: TaggedNodes, attention: CachedAttention, present: tuple[ir.Value, ir.Value], mask: ir.Value
) -> None:
    """Puts a cacheless attention over `present` in place of the node, and `present` in place of its outputs.

    Args:
        graph: Holds it.
        nodes: What computes `present`, in order; inserted here.
        attention: What is replaced.
        present: [batch, kv_heads, total, head_dim] each.
        mask: Additive, [batch, 1, sequence, total].
    """
    # An Attention without past takes heads first and gives them first; [batch, sequence, heads·dims] is kept outside.
    node = attention.node
    query = heads_first(graph, nodes, attention, 0, "query")
    scale: dict[str, Any] = {"scale": node.attributes["scale"].as_float()} if "scale" in node.attributes else {}
    attended = nodes.add(
        "Attention",
        query,
        *present,
        mask,
        name=f"{attention.name}.attention_heads",
        dtype=attention.dtype,
        shape=("batch", attention.query_heads, "sequence", attention.head_dim),
        **scale,
    )
    output = _tokens_first(graph, nodes, attention, attended)
    output.shape = node.outputs[0].shape
    graph.insert_before(node, nodes.nodes)
    for old, new in zip(node.outputs, (output, *present), strict=True):
        replace_value(old, new)
    graph.remove(node, safe=True)
