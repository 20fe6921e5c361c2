"""Tiny graphs as another exporter would leave them, and adapters that deepen and route them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.source import open_source
from tests.tiny_models import save_tiny_llama


def save_foreign_graph(folder: Path, dtype: str, layers: int = 3) -> Path:
    """Writes a graph without what our exporter says about nodes and values, weights and config.json beside it.

    Args:
        folder: Created.
        dtype: "fp32", "fp16" or "bf16", of everything in it.
        layers: Decoder layers.

    Returns:
        The .onnx file.
    """
    folder.mkdir()
    checkpoint = save_tiny_llama(folder / "checkpoint", dtype=BY_OPTION[dtype].name, layers=layers)
    model = open_source(checkpoint, None).plain_model(graph_dtype(dtype))
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.type = value.shape = None
    ir.save(model, folder / "model.onnx", external_data="weights")
    shutil.copy(checkpoint / "config.json", folder)
    return folder / "model.onnx"


def save_routed_adapter(graph: Path, folder: Path, seed: int = 0, routing: RoutingKind = "mlp") -> Path:
    """Writes an adapter: TLI after every layer, and routers that let about half of the tokens through."""
    opened = open_foreign_graph(graph)
    plan = placements("tli", opened.num_layers, every=1)
    injection = expansion_adapter(opened.tensors, plan)
    hidden = opened.tensors["model.norm.weight"].shape[0]
    rng = np.random.default_rng(seed)
    routers = {
        f"model.routers.{layer}.weight": ArrayTensor(rng.standard_normal((1, hidden)).astype(np.float32))
        for layer in range(plan.num_layers)
    }
    tensors = {**injection.tensors, **routers}
    is_dlo, thresholds = (True,) * plan.num_layers, {1: 0.25}
    save_adapter(
        dataclasses.replace(injection, routing=routing, is_dlo=is_dlo, router_thresholds=thresholds, tensors=tensors),
        folder,
    )
    return folder
