"""Fills the description of an artefact (`runtimes/artefact/`)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from dlo_export import __version__
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.weight_file import weight_paths
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.artefact.description import (
    ENGINES_NAME,
    FORMAT_VERSION,
    MODEL_NAME,
    ArtefactDescription,
    KeptData,
    LayerDescription,
    RoutingDescription,
    SourceIdentity,
    save_description,
)
from dlo_export.runtimes.artefact.engine_record import GraphInterface, ParityVerdict
from dlo_export.runtimes.artefact.files import describe_file
from dlo_export.runtimes.decoder_interface import TensorSpec

# What decides whether a token is active; implementations in lower precision differ near the threshold.
ROUTER_RULE = "active iff sigmoid(fp32(x) · w) > {threshold}, x being the layer's input residual stream, all in fp32"


def describe(
    source: ExportSource,
    model: ir.Model,
    *,
    sha256: str | None,
    dtype: str,
    provider: ProviderOption,
    lowering: str,
    reason: str,
    kept_data: tuple[KeptData, ...] = (),
) -> ArtefactDescription:
    """Everything known before parity runs, engines are built and files are complete.

    Args:
        source: What was exported.
        model: The graph as it is released.
        sha256: Of the source's weights, as its `sha256()` says; None where they are not read.
        dtype: "fp32", "fp16" or "bf16".
        provider: What it is to run on.
        lowering: What routed layers became.
        reason: Why that one.
        kept_data: Data files of the source's that its weights go on lying in.
    """
    return ArtefactDescription(
        format_version=FORMAT_VERSION,
        tools={"dlo-export": __version__, "python": platform.python_version(), **_tool_versions()},
        source=_identity(source, sha256),
        files=(),
        kept_data=kept_data,
        dtype=dtype,
        provider=provider,
        lowering=lowering,
        lowering_reason=reason,
        capture_problem=find_lowering(lowering, PROVIDER_TARGETS[provider]).why_not_captured(model.graph),
        plugin_operators=plugin_operators(model),
        routing=_routing(source),
        layers=_layers(source),
        interface=interface(model.graph),
        engines=(),
        parity=ParityVerdict("NOT RUN", "not run yet"),
    )


def complete_description(description: ArtefactDescription, folder: Path) -> None:
    """Writes dlo_artifact.json, once the files it vouches for are complete.

    Args:
        description: Its `files` are filled here: all that are there, of graphs whose engines were not built too.
        folder: The artefact.
    """
    weights = weight_paths(folder, [file.name for file in description.kept_data])
    engines = folder / ENGINES_NAME
    paths = [folder / MODEL_NAME, *weights, *(sorted(engines.iterdir()) if engines.is_dir() else ())]
    save_description(dataclasses.replace(description, files=tuple(map(describe_file, paths))), folder)


def interface(graph: ir.Graph) -> GraphInterface:
    """Name, element type and shape of a graph's inputs and outputs."""
    return GraphInterface(_specs(graph.inputs), _specs(graph.outputs))


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            value.name or "",
            (value.dtype or ir.DataType.UNDEFINED).name.lower(),
            tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ()),
        )
        for value in values
    )


def _identity(source: ExportSource, sha256: str | None) -> SourceIdentity:
    config = source.base.config
    return SourceIdentity(
        source.kind,
        source.base.path.name,
        sha256,
        None if config is None else config.model_type,
        source.adapter_name,
        source.adapter_base,
        source.removed_layers,
    )


def _routing(source: ExportSource) -> RoutingDescription | None:
    if source.routing is None:
        return None
    thresholds = source.routing.thresholds
    return RoutingDescription(
        kind=source.routing.kind,
        rule=ROUTER_RULE.format(
            threshold="the layer's threshold (0.5 where router_thresholds has none)" if thresholds else "0.5"
        ),
        layers=tuple(source.routing.layers),
        rescale_hidden_states=source.routing.rescale,
        scale_factor=source.routing.scale_factor,
        scale_gap=source.routing.scale_gap,
        router_thresholds=thresholds,
    )


def _layers(source: ExportSource) -> tuple[LayerDescription, ...]:
    injected = {layer.position: layer for layer in source.injected_layers}
    routed = set(source.routing.layers) if source.routing else set()
    identity = None if source.weightless else set(source.identity_layers())
    return tuple(
        LayerDescription(
            index=i,
            injected=i in injected,
            source=injected[i].source if i in injected else None,
            init=injected[i].init if i in injected else None,
            routed=i in routed,
            identity=None if identity is None else i in identity,
        )
        for i in range(source.num_layers)
    )


def _tool_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("numpy", "onnx-ir", "onnxruntime")}
