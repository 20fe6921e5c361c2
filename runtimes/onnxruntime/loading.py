"""Whether ONNX Runtime loads a graph and gets through a step, as far as that shows without its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.onnxruntime.session import open_session
from dlo_export.runtimes.onnxruntime.trial_steps import why_no_step


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What ONNX Runtime does not do with a graph.

    Attributes:
        done: "loaded" or "run".
        reason: In its words.
    """

    done: Literal["loaded", "run"]
    reason: str


def why_refused(model: bytes, plugin_library: Path | None, *, needs_kernels: bool, steps: bool) -> Refusal | None:
    """What ONNX Runtime says of types, shapes, attributes and kernels where it does not take them; else None.

    Args:
        model: With inputs in place of its weights. Nothing is optimised: that would need what they hold.
        plugin_library: libdlo_ort.so, for a graph with dlo operators.
        needs_kernels: Whether it is to run on the CPU: a missing kernel counts then alone.
        steps: Try a prompt and a token behind it, too.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    said = f"ONNX Runtime {ort.__version__}"
    try:
        session = open_session(model, "the graph", {"options": options, "plugin_library": plugin_library, "threads": 1})
    except ModelLoadError as err:
        if isinstance(err.__cause__, errors.NotImplemented) and not needs_kernels:
            return None
        return Refusal("loaded", f"{said}: {err.__cause__}")
    reason = why_no_step(session, "the graph") if steps and needs_kernels else None
    return None if reason is None else Refusal("run", f"{said}, {reason}")
