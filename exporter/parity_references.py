"""What an artefact is compared with: its source's PyTorch model, or somebody's graph itself where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.exporter.artefact_runner import exposed_model, serialized
from dlo_export.exporter.exact_products import with_exact_products
from dlo_export.exporter.linked_weights import weights_folder
from dlo_export.exporter.pipeline import state_cache_sizes
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.reduced_source import ReducedSource
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.graph_passes.naming import free_interface_names
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.parity.fewer_layers import FewerLayersRunner
from dlo_export.runtimes.parity.two_builds import TwoBuildsRunner
from dlo_export.runtimes.runner import Runner


def pytorch_reference(source: ExportSource, **options: Any) -> Runner:
    """The PyTorch model of a source, all its layers included: those too that were removed as passing everything on."""
    # Imported here: torch takes seconds, and an export without parity does not need it.
    from dlo_export.runtimes.torch.reference import open_reference  # noqa: PLC0415

    if not isinstance(source, ReducedSource):
        return open_reference(source.config_json(), source.tensors(), **options)
    whole = source.whole
    return FewerLayersRunner(open_reference(whole.config_json(), whole.tensors(), **options), source.kept)


def masked_reference(masked: ir.Model, folder: Path, thresholds: Mapping[int, float], provider: Provider) -> Runner:
    """What a routed graph without a PyTorch model is compared with: its own masked form, on the same provider.

    Args:
        masked: That form.
        folder: Of its weights.
        thresholds: Of its routers, by layer, where they are not one half.
        provider: What runs it.
    """
    name = "its own masked form"
    free, forced = (
        OnnxRuntimeRunner(
            exposed_model(masked, force=force, streams=True),
            weights_folder=folder,
            name=name,
            allow_spinning=False,
            provider=provider,
        )
        for force in (False, True)
    )
    return TwoBuildsRunner(free, forced, name=name, thresholds=thresholds)


def dequantising_reference(
    unlowered: ir.Model, folder: Path, thresholds: Mapping[int, float], provider: Provider, *, routed: bool
) -> Runner:
    """A graph with quantised weights, not lowered, that multiplies by the numbers its codes stand for.

    Its own kernels may round the other factor to 8 bits besides, which `accuracy_level` asks them for; engines do not.

    Args:
        unlowered: In masked form, where it is routed.
        folder: Of its weights.
        thresholds: Of its routers, by layer, where they are not one half.
        provider: What runs it.
        routed: Whether it has routers.
    """
    exact, name = with_exact_products(unlowered), "its weights dequantised"
    runners = [
        OnnxRuntimeRunner(
            exposed_model(exact, force=force, streams=True),
            weights_folder=folder,
            name=name,
            allow_spinning=False,
            provider=provider,
            exact_products=True,
        )
        for force in ((False, True) if routed else (False,))
    ]
    return TwoBuildsRunner(*runners, name=name, thresholds=thresholds) if routed else runners[0]


def graph_as_it_was(source: ExportSource, provider: Provider = CPU) -> OnnxRuntimeRunner:
    """Somebody's file, its cache's sizes said, and its logits called so; its weights may lie behind links.

    Args:
        source: Of a graph, opened.
        provider: What runs it.
    """
    model, sized = load_graph(source.base.path), state_cache_sizes(source.plain_model(ir.DataType.FLOAT))
    weights = weights_folder(model, source.base.path.parent)
    free_interface_names(model.graph)
    for value, named in zip(model.graph.outputs, sized.graph.outputs, strict=True):
        value.name = named.name
    shapes = {value.name: value.shape for value in (*sized.graph.inputs, *sized.graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = shapes.get(value.name, value.shape)
    return OnnxRuntimeRunner(
        serialized(model), weights_folder=weights, name="the graph as it was", allow_spinning=False, provider=provider
    )
