"""Graphs for runner tests: tiny exports that share one weight file, and the routed model they come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.exporter.weight_file import save_weights
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass

DATA = Path(__file__).parent.parent / "data"


@dataclasses.dataclass(frozen=True)
class Builds:
    """One model's graphs.

    Attributes:
        folder: Holds model.onnx (as released) and the weights of all builds.
        scored: Serialized; with `router_scores` outputs.
        forced: Serialized; with `force_active` inputs as well.
    """

    folder: Path
    scored: bytes
    forced: bytes

    @property
    def released(self) -> Path:
        """The graph as released."""
        return self.folder / "model.onnx"


def routed_builds(model: Path, folder: Path, lowering: str = "compact") -> Builds:
    """Exports a routed checkpoint into a folder, with its parity builds."""
    source = open_source(model, None)
    folder.mkdir(parents=True, exist_ok=True)
    released = build_model(source, lowering)
    save_weights(released, folder / "model.onnx.data")
    ir.save(released, folder / "model.onnx")
    return Builds(folder, _exposed(source, lowering, folder, False), _exposed(source, lowering, folder, True))


def save_plain_graph(model: Path, folder: Path) -> Path:
    """Exports a dense checkpoint; returns the .onnx file."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = build_model(open_source(model, None), "none")
    save_weights(graph, folder / "model.onnx.data")
    ir.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


def _exposed(source: ExportSource, lowering: str, folder: Path, force: bool) -> bytes:
    model = build_model(source, lowering)
    ExposeRoutingPass(force=force)(model)
    save_weights(model, folder / "model.onnx.data", write=False)
    return ir.to_proto(model).SerializeToString()
