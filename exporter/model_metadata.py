"""What model.onnx says about itself: who wrote it, from what, and how it routes. Netron shows all of it."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export import __version__
from dlo_export.checkpoints.interface import LEFT_PADDING
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.graph_passes.find.padding import takes_left_padding
from dlo_export.graph_passes.spec.pass_contract import PASSES_KEY

PRODUCER = "dlo-export"
INJECTED_LAYERS = "injected_layers"  # key of their positions, in decimal


def set_model_metadata(model: ir.Model, source: ExportSource, *, dtype: str, lowering: str) -> None:
    """Fills in producer, graph name, description and metadata of a finished graph.

    Args:
        model: Changed in place; what other exporters noted of themselves in metadata stays.
        source: What it was made from.
        dtype: "fp32", "fp16" or "bf16".
        lowering: What routed layers became.
    """
    name = source.base.path.name or source.base.path.resolve().name
    # ONNX's strings are UTF-8; a file's name may be any bytes.
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    if model.producer_name not in (None, "", PRODUCER):
        model.metadata_props["source_producer"] = f"{model.producer_name} {model.producer_version or ''}".strip()
    model.producer_name, model.producer_version = PRODUCER, __version__
    model.graph.name = name
    injected, routed = len(source.injected_layers), len(source.routing.layers) if source.routing is not None else 0
    model.doc_string = (
        f"Llama decoder of {source.num_layers} layers ({injected} injected, {routed} routed, lowering {lowering}), "
        f"{dtype}, made from {name} by {PRODUCER} {__version__}"
    )
    model.metadata_props.update(
        {
            "model_name": name,
            "dlo_export_version": __version__,
            "dtype": dtype,
            "lowering": lowering,
            "num_layers": str(source.num_layers),
            INJECTED_LAYERS: " ".join(str(layer.position) for layer in source.injected_layers),
            "routed_layers": " ".join(map(str, source.routing.layers)) if source.routing is not None else "",
        }
    )
    if not takes_left_padding(model.graph):
        model.metadata_props[LEFT_PADDING] = "no"
    if source.routing is not None and source.routing.thresholds:
        listed = (f"{layer}:{threshold!r}" for layer, threshold in source.routing.thresholds.items())
        model.metadata_props[THRESHOLDS] = " ".join(listed)


def copy_model_metadata(released: ir.Model, model: ir.Model, lowering: str) -> None:
    """Lets another lowering of a released graph say the same about itself, but for the lowering.

    Args:
        released: As `set_model_metadata` left it.
        model: Changed in place.
        lowering: Its own.
    """
    model.producer_name, model.producer_version = released.producer_name, released.producer_version
    model.graph.name = released.graph.name
    before = released.metadata_props["lowering"]
    model.doc_string = (released.doc_string or "").replace(f" lowering {before})", f" lowering {lowering})")
    own = {name: value for name, value in released.metadata_props.items() if name != PASSES_KEY}
    model.metadata_props.update({**own, "lowering": lowering})
