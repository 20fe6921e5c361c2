"""Whether ONNX Runtime loads a graph, as far as that shows without its weights."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.onnxruntime.session import open_session


def why_not_loaded(model: bytes, plugin_library: Path | None, *, needs_kernels: bool) -> str | None:
    """What ONNX Runtime says of types, shapes, attributes and kernels where it does not take them; else None.

    Args:
        model: With inputs in place of its weights. Nothing is optimised: that would need what they hold.
        plugin_library: libdlo_ort.so, for a graph with dlo operators.
        needs_kernels: Whether it is to run on the CPU: a missing kernel counts then alone.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        open_session(model, "the graph", {"options": options, "plugin_library": plugin_library, "threads": 1})
    except ModelLoadError as err:
        if isinstance(err.__cause__, errors.NotImplemented) and not needs_kernels:
            return None
        return f"ONNX Runtime {ort.__version__}: {err.__cause__}"
    return None
