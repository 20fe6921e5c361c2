"""Which ONNX node and which decoder layer a layer of a parsed TensorRT network comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dlo_export.checkpoints.llama_layer import LAYER_NUMBER

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]|]+?)(?: \||\])")
_DECODER_LAYER = re.compile(rf"\bmodel\.(?:layers|routers)\.{LAYER_NUMBER}(?!\d)")


def decoder_layer(name: str) -> int | None:
    """Index of the decoder layer a node's name carries, None where it carries none."""
    match = _DECODER_LAYER.search(name)
    return None if match is None else int(match[1])


def network_layers(trt: Any, network: Any) -> Iterator[Any]:
    """Layers of a network, each of the class that has its own properties.

    Source: TensorRT's Python binding returns plain ILayer objects and documents assigning `__class__`.
    """
    classes = {
        trt.LayerType.ATTENTION_INPUT: trt.IAttentionBoundaryLayer,
        trt.LayerType.ATTENTION_OUTPUT: trt.IAttentionBoundaryLayer,
        trt.LayerType.CONDITION: trt.IConditionLayer,
        trt.LayerType.CONDITIONAL_INPUT: trt.IIfConditionalBoundaryLayer,
        trt.LayerType.CONDITIONAL_OUTPUT: trt.IIfConditionalBoundaryLayer,
    }
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in classes:
            layer.__class__ = classes[layer.type]
        yield layer


def node_name(trt: Any, layer: Any) -> str:
    """Name of the ONNX node a layer comes from, else the layer's own.

    The importer writes the node into the layer's metadata; boundaries of an If and of an attention belong to the
    construct that made them.
    """
    if layer.type in (trt.LayerType.CONDITION, trt.LayerType.CONDITIONAL_INPUT, trt.LayerType.CONDITIONAL_OUTPUT):
        return str(layer.conditional.name)
    if layer.type in (trt.LayerType.ATTENTION_INPUT, trt.LayerType.ATTENTION_OUTPUT):
        return str(layer.attention.name)
    match = _ONNX_NODE.search(layer.metadata)
    return match[1] if match is not None else str(layer.name)


def input_tensors(layer: Any) -> list[Any]:
    """Tensors a layer reads; optional inputs that are not given are left out."""
    tensors = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor for tensor in tensors if tensor is not None]


def output_tensors(layer: Any) -> list[Any]:
    """Tensors a layer makes."""
    return [layer.get_output(index) for index in range(layer.num_outputs)]
