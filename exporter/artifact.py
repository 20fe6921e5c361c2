"""dlo_artifact.json: an artefact's description of itself."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export import __version__
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.exporter.sources.source import ExportSource

FORMAT_VERSION = 1
FILE_NAME = "dlo_artifact.json"
MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx.data"

# What decides whether a token is active; implementations in lower precision differ near the threshold.
ROUTER_RULE = "active iff sigmoid(fp32(x) · w) > 0.5, x being the layer's input residual stream, all in fp32"


def describe(source: ExportSource, model: ir.Model, *, dtype: str, lowering: str, reason: str) -> dict[str, Any]:
    """Everything known before parity runs.

    Args:
        source: What was exported.
        model: The graph as it is released.
        dtype: "fp32", "fp16" or "bf16".
        lowering: What routed layers became.
        reason: Why that one.
    """
    injected = {layer.position: layer for layer in source.injected_layers}
    routed = set(source.routing.layers) if source.routing else set()
    identity = set(source.identity_layers())
    return {
        "format_version": FORMAT_VERSION,
        "tools": {"dlo-export": __version__, "python": platform.python_version(), **_tool_versions()},
        "source": {"kind": source.kind, "name": source.base.path.name, "sha256": source.base.sha256()},
        "dtype": dtype,
        "lowering": lowering,
        "lowering_reason": reason,
        "routing": _routing(source),
        "layers": [
            {
                "index": i,
                "injected": i in injected,
                "source": injected[i].source if i in injected else None,
                "init": injected[i].init if i in injected else None,
                "routed": i in routed,
                "identity": i in identity,
            }
            for i in range(source.num_layers)
        ],
        "interface": {"inputs": interface(model.graph.inputs), "outputs": interface(model.graph.outputs)},
        "engines": [],
        "parity": {"verdict": "NOT RUN", "reason": "not run yet"},
    }


def save_description(description: dict[str, Any], folder: Path) -> None:
    """Writes dlo_artifact.json."""
    save_json(folder / FILE_NAME, description)


def load_description(folder: Path) -> dict[str, Any]:
    """Reads an artefact's dlo_artifact.json.

    Raises:
        InputError: The folder is no artefact, or of a newer format.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise InputError(f"{folder}: has no {FILE_NAME}", hint="give a folder that dlo-export wrote")
    description = read_json(path)
    if description.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {description.get('format_version')}, this version reads {FORMAT_VERSION}",
            hint="export the model again, or use the dlo-export that wrote it",
        )
    return description


def mean_active_rates(description: dict[str, Any], rates: Mapping[int, float]) -> dict[str, float | None]:
    """Share of tokens whose MLP runs, averaged over the original and over the injected layers.

    Args:
        description: Of the artefact.
        rates: By routed layer; a layer without router is always active.

    Returns:
        By "original" and "injected"; None where there are no such layers.
    """
    kinds: dict[str, list[float]] = {"original": [], "injected": []}
    for layer in description["layers"]:
        kinds["injected" if layer["injected"] else "original"].append(rates.get(layer["index"], 1.0))
    return {kind: sum(values) / len(values) if values else None for kind, values in kinds.items()}


def _routing(source: ExportSource) -> dict[str, Any] | None:
    if source.routing is None:
        return None
    return {
        "kind": source.routing.kind,
        "rule": ROUTER_RULE,
        "layers": list(source.routing.layers),
        "rescale_hidden_states": source.routing.rescale,
        "scale_factor": source.routing.scale_factor,
        "scale_gap": source.routing.scale_gap,
    }


def interface(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
    """Name, element type and shape of a graph's inputs or outputs."""
    return [
        {
            "name": value.name,
            "dtype": value.dtype.name.lower() if value.dtype is not None else None,
            "shape": [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()],
        }
        for value in values
    ]


def _tool_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("numpy", "onnx-ir", "onnxruntime")}
