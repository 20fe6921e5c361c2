"""The fp32 twin of a TensorRT graph: what an engine is built from, in a form that ONNX Runtime runs on a CPU."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.exporter.pipeline import TensorRtOptions, run_steps, twin_steps
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.target_graphs import build_tensorrt_model
from dlo_export.exporter.weight_file import external_tensors

# Slots of the twin's static cache: more than parity feeds, and no more, since every step attends over all of them.
_MOST_SLOTS = 128


def tensorrt_twin(source: ExportSource, options: TensorRtOptions, released: ir.Model | None) -> ir.Model:
    """Builds a TensorRT graph in fp32 on the weights of the artefact's own graph.

    It differs from the graph the engine is built from in its dtype, in the number of its cache's slots, in that it
    gives the logits of all tokens, and in that plugins have their bodies in standard operators.

    Args:
        source: What the artefact was made from.
        options: Of the engine's graph.
        released: The artefact's fp32 model.onnx; None where that is somebody's graph, which stores weights its own way:
            then the twin's are lazy.

    Raises:
        InputError: The weights are not those of this source.
    """
    options = dataclasses.replace(options, last_logits=False, max_cache=min(options.max_cache, _MOST_SLOTS))
    options = dataclasses.replace(options, max_sequence=min(options.max_sequence, options.max_cache))
    model = build_tensorrt_model(source, options, ir.DataType.FLOAT)
    run_steps(model, twin_steps(options))
    if released is not None:
        _take_weights(model, source, released)
    return model


def _take_weights(twin: ir.Model, source: ExportSource, released: ir.Model) -> None:
    stored = external_tensors(released.graph)
    for name, value in twin.graph.initializers.items():
        if name in stored:
            value.const_value = stored.pop(name)
    # Routers are written in another form there, and small: the twin holds its own.
    for layer in source.routing.layers if source.routing is not None else ():
        stored.pop(router_name(layer), None)
    if stored:
        raise InputError(
            f"model.onnx holds weights that a TensorRT graph of this source has not: {', '.join(sorted(stored)[:5])}",
            hint="give the model (and adapter) the artefact was made from, and the version that made it",
        )
