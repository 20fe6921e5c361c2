"""Whether ONNX Runtime loads what was made of somebody's graph: asked before anything is written, without weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_description import interface
from dlo_export.exporter.parity_check import named_operators
from dlo_export.exporter.skeleton import without_weights
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.runtimes.decoder_interface import DecoderInterface, cache_kind
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.session import open_session


def check_loads(model: ir.Model, path: Path, dtype: str, provider: Provider, plugin_library: Path | None) -> None:
    """Refuses a graph that is no decoder to our runners, or that ONNX Runtime does not load.

    A session is made of the graph with inputs in place of its weights, and nothing is optimised: that costs neither
    the memory of the weights nor the time to read them. Types, shapes, attributes and kernels are looked at. Whether
    the sizes fit that only a step knows, a step tells: parity's, which runs it.

    Args:
        model: The finished graph; its weights are not read.
        path: The graph it was made of.
        dtype: "fp32", "fp16" or "bf16".
        provider: That it is made for. The session is the CPU's, which every machine has; kernels that it lacks are
            held against the graph only where it is to run on the CPU, and that is no gap which is known.
        plugin_library: libdlo_ort.so, for a graph with dlo operators.

    Raises:
        InputError: It cannot be loaded; with ONNX Runtime's reason.
    """
    said = interface(model.graph)
    kind = cache_kind([value.name for value in said.inputs])
    DecoderInterface.of(said.inputs, said.outputs, str(path), cache=kind)
    needs_kernels = provider is CPU and CPU.why_not_run(BY_OPTION[dtype], named_operators(model)) is None
    reason = _why_not_loaded(model, plugin_library, needs_kernels=needs_kernels)
    if reason is None:
        return
    if _why_not_loaded(load_graph(path), plugin_library, needs_kernels=needs_kernels) is not None:
        raise InputError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load this graph: {reason}",
            hint="export it again, or install the ONNX Runtime that it was made for",
        )
    raise InputError(
        f"{path}: ONNX Runtime {ort.__version__} loads this graph, but not what was made of it: {reason}",
        hint="choose another --lowering (masked changes least), or export the checkpoint; please report it",
    )


def _why_not_loaded(model: ir.Model, plugin_library: Path | None, *, needs_kernels: bool) -> str | None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        open_session(
            without_weights(model).SerializeToString(),
            "the graph",
            {"options": options, "plugin_library": plugin_library, "threads": 1},
        )
    except ModelLoadError as err:
        missing = isinstance(err.__cause__, ort.capi.onnxruntime_pybind11_state.NotImplemented)
        return str(err.__cause__) if needs_kernels or not missing else None
    return None
