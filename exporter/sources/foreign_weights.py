"""Weights of somebody's graph under Hugging Face names, told apart by what they feed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import EMBEDDING, FINAL_NORM, HEAD, layer_tensor_name
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.residual_stream import embedding_lookup
from dlo_export.graph_passes.weights.dense import DenseStorage, dense_storage
from dlo_export.graph_passes.weights.embedding import embedding_table
from dlo_export.graph_passes.weights.linear import linear_weight
from dlo_export.graph_passes.weights.storage import Place, StoredRows, WeightStorage

# What scales the stream behind the last layer.
_FINAL_NORMS = frozenset({"Mul", "RMSNormalization", "SimplifiedLayerNormalization"})


def named_weights(layers: Sequence[DecoderLayer]) -> dict[str, LazyTensor]:
    """A graph's weights, in Hugging Face orientation.

    Those of layers that hold other weights besides, such as norms of queries, are left out.

    Args:
        layers: All of the graph's.
    """
    named: dict[str, LazyTensor] = {}
    for layer in layers:
        if why_unnamed(layer) is None:
            for projection in layer.projections.values():
                named[layer_tensor_name(layer.index, projection.tensor)] = projection.contents
    return named | _outer_weights(layers[0], layers[-1])


def why_unnamed(layer: DecoderLayer) -> str | None:
    """Why a layer's weights have no names; None where they have."""
    try:
        _ = layer.projections
    except GraphPassError as err:
        return err.message
    return None


def is_quantised(tensor: LazyTensor) -> bool:
    """Whether a graph stores something else than the numbers it computes with."""
    return not (isinstance(tensor, StoredRows) and isinstance(tensor.storage, DenseStorage))


def _outer_weights(first: DecoderLayer, last: DecoderLayer) -> dict[str, LazyTensor]:
    """Embedding, final norm and head: the constants before the first layer and behind the last."""
    embedding = embedding_table(embedding_lookup(first.input))
    assert embedding is not None, "the stream starts at a table"
    found: dict[str, WeightStorage] = {}
    for node in _nodes_behind(last.output):
        if (head := linear_weight(node)) is not None and head.shape[1] == last.hidden_size:
            found[HEAD] = head
        for at in (Place(node, index) for index in range(len(node.inputs)) if node.op_type in _FINAL_NORMS):
            norm = dense_storage(at, "vector")
            if norm is not None and norm.shape == (last.hidden_size,):
                found[FINAL_NORM] = norm
    behind = {name: StoredRows(storage, 0, storage.shape[0]) for name, storage in found.items()}
    return {EMBEDDING: embedding, **behind}


def _nodes_behind(value: ir.Value) -> list[ir.Node]:
    """Every node that depends on a value, nearest first."""
    nodes: dict[ir.Node, None] = {}
    waiting = [value]
    while waiting:
        for node in waiting.pop(0).consumers():
            if node not in nodes:
                nodes[node] = None
                waiting.extend(node.outputs)
    return list(nodes)
