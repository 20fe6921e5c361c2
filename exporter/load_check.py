"""Whether ONNX Runtime loads what was made of somebody's graph: asked before anything is written, without weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_description import interface
from dlo_export.exporter.parity_check import named_operators
from dlo_export.exporter.skeleton import without_weights
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.exporter.tensorrt.engine_request import plugin_operators
from dlo_export.runtimes.decoder_interface import DecoderInterface, cache_kind
from dlo_export.runtimes.onnxruntime.loading import why_not_loaded
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider


def check_loads(model: ir.Model, path: Path, dtype: str, provider: Provider, plugin_library: Path | None) -> None:
    """Refuses a graph that is no decoder to our runners, or that ONNX Runtime does not load.

    A session is made of the graph with inputs in place of its weights: that costs neither the memory of the weights
    nor the time to read them. Whether the sizes fit that only a step knows, a step tells: parity's, which runs it.

    Args:
        model: The finished graph; its weights are not read.
        path: The graph it was made of.
        dtype: "fp32", "fp16" or "bf16".
        provider: That it is made for. The session is the CPU's, which every machine has; kernels that it lacks are
            held against the graph only where it is to run on the CPU, and that is no gap which is known.
        plugin_library: libdlo_ort.so, for a graph with dlo operators; nothing loads one without it.

    Raises:
        InputError: It cannot be loaded; with ONNX Runtime's reason.
    """
    said = interface(model.graph)
    kind = cache_kind([value.name for value in said.inputs])
    DecoderInterface.of(said.inputs, said.outputs, str(path), cache=kind)
    if plugin_operators(model) and plugin_library is None:
        return
    needs_kernels = provider is CPU and CPU.why_not_run(BY_OPTION[dtype], named_operators(model)) is None

    def why_not(graph: ir.Model) -> str | None:
        skeleton = without_weights(graph).SerializeToString()
        return why_not_loaded(skeleton, plugin_library, needs_kernels=needs_kernels)

    if (reason := why_not(model)) is None:
        return
    if why_not(load_graph(path)) is not None:
        raise InputError(
            f"{path}: cannot be loaded: {reason}",
            hint="export it again, or install the ONNX Runtime that it was made for",
        )
    raise InputError(
        f"{path}: loads, but not what was made of it: {reason}",
        hint="choose another --lowering (masked changes least), or export the checkpoint; please report it",
    )
