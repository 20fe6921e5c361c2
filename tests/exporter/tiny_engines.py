"""Tiny models as the exporter makes TensorRT graphs of them: seconds per engine, every kind of layer in them."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.tensorrt.export import engine_request, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtPlan, TensorRtRequest, plan_tensorrt
from tests.tiny_models import save_tiny_llama

_CHECKPOINTS = tempfile.TemporaryDirectory(prefix="tiny-engines-")

FILES = ["model.onnx", "model.onnx.data"]
"""What `save_request` saves: what is there before a build, and after one that failed."""


@functools.cache
def _checkpoint(layers: int, routed: bool) -> Path:
    return save_tiny_llama(
        Path(_CHECKPOINTS.name) / f"{layers}-{routed}",
        hidden=64,
        intermediate=96,
        layers=layers,
        heads=4,
        kv_heads=4,
        vocab=40,
        routed=(True,) * layers if routed else None,
    )


def plan(lowering: str = "compact", layers: int = 1, dtype: str = "bf16") -> TensorRtPlan:
    """What `--trt` would build, for one GPU; all layers are routed, unless the lowering is "none"."""
    source = open_source(_checkpoint(layers, lowering != "none"), None)
    request = TensorRtRequest("rtx", ("sm89",), max_batch=2, max_sequence=8, max_cache=16)
    return plan_tensorrt(source, request, "auto" if lowering == "none" else lowering, dtype)


def save_request(
    folder: Path,
    lowering: str = "compact",
    layers: int = 1,
    dtype: str = "bf16",
    change: Callable[[ir.Model], object] | None = None,
    **fields: Any,
) -> EngineRequest:
    """Saves a graph and its weights, and asks for its engine, in the prefill profile alone and not from the cache.

    Args:
        folder: For the graph.
        lowering: As `plan`.
        layers: As `plan`.
        dtype: As `plan`.
        change: Breaks the graph before it is saved.
        fields: Of the request, in place of the exporter's.
    """
    planned = plan(lowering, layers, dtype)
    (engine,) = planned.engines
    if change is not None:
        change(engine.model)
    save_graphs(planned, folder, Reporter())
    asked = engine_request(planned, engine, folder)
    given = {"output": folder / "engines" / "model.engine", "profiles": asked.profiles[:1], "use_cache": False}
    return dataclasses.replace(asked, **(given | fields))


def node(model: ir.Model, name: str) -> ir.Node:
    """The node of that name."""
    return next(each for each in model.graph.all_nodes() if each.name == name)
