"""The pass lists: from the plain graph to what a target runs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from exporter.source import ExportSource
from graph_passes.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from graph_passes.inject_layers import InjectLayersPass, LayerInjection
from graph_passes.invariants import Stage, check_order, check_stage
from graph_passes.lower_skip_to_compaction import LowerSkipToCompactionPass
from graph_passes.route_layers import RouteLayersPass

# "none" where nothing is routed.
Lowering = Literal["none", "masked", "compact"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One entry of a pass list.

    Attributes:
        graph_pass: What runs.
        stage: What must hold afterwards.
    """

    graph_pass: ir.passes.InPlacePass
    stage: Stage


def onnxruntime_steps(source: ExportSource, lowering: Lowering) -> list[Step]:
    """What turns the plain graph into the one ONNX Runtime runs, in order, each step with its reason."""
    injects, routes, compacts = _injects(source), source.routing is not None, lowering == "compact"
    last_stage: Stage = "lowered" if compacts else "routed" if routes else "injected"
    return [
        # Deepen first: routers are numbered in the deepened model.
        *([Step(_inject_layers(source), "injected")] if injects else []),
        # The masked form is exact standard ONNX, and the oracle for what follows.
        *([Step(_route_layers(source), "routed")] if routes else []),
        # The one lowering: tokens that skip leave the MLP's batch.
        *([Step(LowerSkipToCompactionPass(), "lowered")] if compacts else []),
        # Last, because the passes above look for projections one by one. Decode gets 4 % faster.
        Step(FuseSiblingMatMulsPass(), last_stage),
    ]


def build_model(source: ExportSource, lowering: Lowering, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """Builds the source's graph and runs the pipeline on it.

    Args:
        source: What to export.
        lowering: What routed layers become.
        dtype: Of weights, KV cache and logits; a foreign graph keeps its own.

    Returns:
        The finished graph, its weights still lazy.

    Raises:
        graph_passes.errors.GraphPassError: The graph (a foreign one) is not what a pass needs.
        graph_passes.invariants.GraphInvariantError: A stage broke its promise: a bug.
    """
    steps = onnxruntime_steps(source, lowering)
    check_order([step.graph_pass for step in steps])
    model = source.plain_model(dtype)
    check_stage(model, "plain")
    for step in steps:
        step.graph_pass(model)
        check_stage(model, step.stage)
    return model


def _injects(source: ExportSource) -> bool:
    return source.adapter is not None and bool(source.injected_layers)


def _inject_layers(source: ExportSource) -> InjectLayersPass:
    assert source.adapter is not None, "only an adapter injects; a deepened checkpoint has its layers already"
    return InjectLayersPass(
        tuple(
            LayerInjection(layer.position, layer.source, weights=source.adapter.layer_tensors(layer.position))
            for layer in source.injected_layers
        )
    )


def _route_layers(source: ExportSource) -> RouteLayersPass:
    assert source.routing is not None
    return RouteLayersPass(
        source.routers(), source.routing.rescale, source.routing.scale_factor, source.routing.scale_gap
    )
