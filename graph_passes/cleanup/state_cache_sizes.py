"""Say how wide a layer's cache is, where an exporter left a name for it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.find.projections import key_width
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class StateCacheSizesPass(GraphPass):
    """Write the size of a head into the shapes of the cache.

    Before::

        past_key_values.0.key: float[batch, 2, past, "kv_cache_dim"]

    After::

        past_key_values.0.key: float[batch, 2, past, 64]

    Whoever runs the graph makes an empty cache from these shapes. onnxruntime-genai's builder leaves names there,
    since its own runtime reads the size elsewhere. Optional: a graph that says its sizes is left alone. Scope: the main
    graph's inputs and outputs.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Write every size that is not there."""
        layers = find_decoder_layers(model.graph)
        unknown = [layer for layer in layers if any(_head_is_unknown(value) for value in layer.cache)]
        stated = [_state(layer) for layer in unknown]
        return any(stated)


def _head_is_unknown(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 4 and not isinstance(value.shape[3], int)


def _state(layer: DecoderLayer) -> bool:
    # Keys of all heads side by side are what k_proj computes; how many heads there are the cache itself says.
    width, heads = key_width(layer.attention, layer.present_key), (layer.past_key.shape or (None, None))[1]
    if width is None or not isinstance(heads, int) or not heads or width % heads:
        return False
    for value in layer.cache:
        if value.shape is not None and _head_is_unknown(value):
            value.shape = ir.Shape((*value.shape[:3], width // heads))
    return True
