"""Compute the logits of each sequence's last token only."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import ATTENTION_MASK, KV_LENGTHS, LOGITS, WRITE_INDICES
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant


@dataclasses.dataclass(frozen=True)
class KeepLastLogitsPass(GraphPass):
    """Take the last real token behind the last layer, so that norm and head run once per sequence.

    Before::

        logits = head(norm(y))                                           # [batch, sequence, vocab]

    After, with a growing cache, where batches are padded at the left, or, by onnxruntime-genai, at the right::

        real   = Slice(attention_mask, −sequence, ∞, axis 1)              # [batch, sequence], the step's own tokens
        last   = TopK(Mul(real, Range(0, sequence, 1)), 1)               # [batch, 1], the largest number of one
        logits = head(norm(GatherND(y, Unsqueeze(last, [2]), batch_dims=1)))  # [batch, 1, vocab]

    Where there is no attention_mask [batch, past + sequence], the last column is taken: Slice(y, −1, ∞, axis 1).

    After, with a static cache, where they are ragged to the right::

        last   = Unsqueeze(kv_lengths − write_indices − 1, [1, 2])        # [batch, 1, 1]
        logits = head(norm(GatherND(y, last, batch_dims=1)))             # [batch, 1, vocab]

    Of a sequence without a real token in the step it is some column: nobody reads that. TopK finds a largest number
    in every opset and with every provider; CUDA's has no ArgMax that takes the last of equals, nor of integers.

    Scope: main graph; the head must take the number of tokens from what it reads.
    Source: ONNX Slice-13, Range-11, TopK-11, GatherND-13.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (InjectLayersPass, UseStaticCachePass)
    nodes_from: ClassVar[Border | None] = "injected"

    def rewrite(self, model: ir.Model) -> bool:
        """Cut the stream behind the last layer."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        layer = find_decoder_layers(graph)[-1]
        stream, new = layer.output, TaggedNodes(self._name, None)
        # Whoever reads the stream now is the head; noted before what follows reads it too.
        readers = [(node, index) for node, index in stream.uses()]
        if WRITE_INDICES in inputs and KV_LENGTHS in inputs:
            row = _gathered(new, layer, _written(graph, new, inputs[WRITE_INDICES], inputs[KV_LENGTHS]))
        elif (mask := inputs.get(ATTENTION_MASK)) is not None and mask.shape is not None and len(mask.shape) == 2:
            row = _gathered(new, layer, _unpadded(graph, new, layer, mask))
        else:
            row = _sliced(graph, new, layer)
        # What follows computes one row per sequence: norm and head take the number of tokens from what they read.
        producer = stream.producer()
        assert producer is not None, "a layer computes its output"
        graph.insert_after(producer, new.nodes)
        for node, position in readers:
            node.replace_input_with(position, row)
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        assert logits.shape is not None, "an output's shape is declared"
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        return True


def _sliced(graph: ir.Graph, new: TaggedNodes, layer: DecoderLayer) -> ir.Value:
    """The last column of the stream, [batch, 1, hidden]."""
    first = shared_constant(graph, "model.last_token.first", np.array([-1], np.int64))
    end = shared_constant(graph, "model.last_token.end", np.array([np.iinfo(np.int64).max], np.int64))
    axis = shared_constant(graph, "model.last_token.axis", np.array([1], np.int64))
    stream = layer.output
    shape = (layer.token_dims[0], 1, layer.hidden_size)
    return new.add("Slice", stream, first, end, axis, name="model.last_token", dtype=element_type(stream), shape=shape)


def _unpadded(graph: ir.Graph, new: TaggedNodes, layer: DecoderLayer, mask: ir.Value) -> ir.Value:
    """Where each sequence's last real token stands in the step, [batch, 1, 1]."""
    stream, int64 = layer.output, ir.DataType.INT64
    batch, sequence = layer.token_dims
    end = shared_constant(graph, "model.last_token.end", np.array([np.iinfo(np.int64).max], np.int64))
    axis = shared_constant(graph, "model.last_token.axis", np.array([1], np.int64))
    axes = shared_constant(graph, "model.last_token.axes", np.array([2], np.int64))
    sizes = new.add("Shape", stream, name="model.last_token.sizes", dtype=int64, shape=(3,))
    count = new.add("Slice", sizes, axis, axes, name="model.last_token.count", dtype=int64, shape=(1,))  # from 1 to 2
    first = new.add("Neg", count, name="model.last_token.first", dtype=int64, shape=(1,))
    shape = (batch, sequence)
    real = new.add("Slice", mask, first, end, axis, name="model.last_token.real", dtype=element_type(mask), shape=shape)
    if real.dtype != int64:
        real = new.add("Cast", real, name="model.last_token.real_number", dtype=int64, shape=shape, to=int(int64))

    # Numbers of the step's tokens, 0 at padding: the largest is the last real one's.
    zero = shared_constant(graph, "model.last_token.zero", np.array(0, np.int64))
    one = shared_constant(graph, "model.last_token.one", np.array(1, np.int64))
    limit = new.add("Squeeze", count, name="model.last_token.limit", dtype=int64, shape=())
    numbers = new.add("Range", zero, limit, one, name="model.last_token.numbers", dtype=int64, shape=(sequence,))
    own = new.add("Mul", real, numbers, name="model.last_token.real_numbers", dtype=int64, shape=shape)
    k = shared_constant(graph, "model.last_token.k", np.array([1], np.int64))
    top = ir.node("TopK", [own, k], {"axis": 1}, num_outputs=2, name="model.last_token.top", metadata_props=new.tags)
    last = top.outputs[0]
    for value, name in zip(top.outputs, ("index", "index_place"), strict=True):
        value.name, value.dtype, value.shape = f"model.last_token.{name}", int64, ir.Shape((batch, 1))
    new.nodes.append(top)
    return new.add("Unsqueeze", last, axes, name="model.last_token.indices", dtype=int64, shape=(batch, 1, 1))


def _written(graph: ir.Graph, new: TaggedNodes, write_indices: ir.Value, kv_lengths: ir.Value) -> ir.Value:
    """Likewise, where a step's tokens begin at write_indices and end before kv_lengths."""
    int64 = ir.DataType.INT64
    one = shared_constant(graph, "model.last_token.one", np.array([1], np.int64))
    axes = shared_constant(graph, "model.last_token.axes", np.array([1, 2], np.int64))
    shape: tuple[int | str, ...] = ("batch",)
    count = new.add("Sub", kv_lengths, write_indices, name="model.last_token.count", dtype=int64, shape=shape)
    last = new.add("Sub", count, one, name="model.last_token.index", dtype=int64, shape=shape)
    return new.add("Unsqueeze", last, axes, name="model.last_token.indices", dtype=int64, shape=("batch", 1, 1))


def _gathered(new: TaggedNodes, layer: DecoderLayer, index: ir.Value) -> ir.Value:
    """Each sequence's last real token of the stream, [batch, 1, hidden]."""
    stream = layer.output
    return new.add(
        "GatherND",
        stream,
        index,
        name="model.last_token",
        dtype=element_type(stream),
        shape=(layer.token_dims[0], 1, layer.hidden_size),
        batch_dims=1,
    )
