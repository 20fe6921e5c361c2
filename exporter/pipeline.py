"""The pass lists: from the plain graph to what a target runs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.graph_passes.cache.grow_cache_outside_attention import GrowCacheOutsideAttentionPass
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.compute_norms_in_float32 import ComputeNormsInFloat32Pass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.cleanup.keep_last_logits import KeepLastLogitsPass
from dlo_export.graph_passes.cleanup.name_batch_dimension import NameBatchDimensionPass
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass, LayerInjection
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.lowerings.lower_skip_to_plugin import LowerSkipToPluginPass
from dlo_export.graph_passes.lowerings.lower_skip_to_topk import LowerSkipToTopKPass
from dlo_export.graph_passes.routing.reduce_router_products import ReduceRouterProductsPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.invariants import Stage, check_order, check_stage

# "none" where nothing is routed.
Lowering = Literal["none", "masked", "compact", "if"]

_LOWERING_PASSES: dict[Lowering, type[ir.passes.InPlacePass]] = {
    "compact": LowerSkipToCompactionPass,
    "if": LowerSkipToIfPass,
}


TensorRtLowering = Literal["none", "masked", "compact", "if", "plugin"]


@dataclasses.dataclass(frozen=True)
class TensorRtOptions:
    """What a TensorRT graph is built for.

    Attributes:
        lowering: What routed layers become; "masked" is the oracle, never built into an engine.
        cache: "static" has a fixed number of slots updated in place; "growing" keeps ONNX Runtime's interface.
        max_batch: Sequences per step at most.
        max_sequence: Tokens per sequence and step at most.
        max_cache: Slots of a static cache.
        last_logits: Compute the logits of each sequence's last token only; needs the static cache.
    """

    lowering: TensorRtLowering
    cache: Literal["static", "growing"] = "static"
    max_batch: int = 4
    max_sequence: int = 512
    max_cache: int = 2048
    last_logits: bool = False


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
    injects, routes, lowers = _injects(source), source.routing is not None, lowering in _LOWERING_PASSES
    last_stage: Stage = "lowered" if lowers else "routed" if routes else "injected"
    return [
        # Deepen first: routers are numbered in the deepened model.
        *([Step(_inject_layers(source), "injected")] if injects else []),
        # The masked form is exact standard ONNX, and the oracle for what follows.
        *([Step(_route_layers(source), "routed")] if routes else []),
        # The one lowering: tokens that skip leave the MLP's batch, or the MLP runs only where a token is active.
        *([Step(_LOWERING_PASSES[lowering](), "lowered")] if lowers else []),
        # Last, because the passes above look for projections one by one. Decode gets 4 % faster.
        Step(FuseSiblingMatMulsPass(), last_stage),
        # transformers.js and optimum know the batch by its dimension's name.
        Step(NameBatchDimensionPass(), last_stage),
    ]


def tensorrt_steps(source: ExportSource, options: TensorRtOptions) -> list[Step]:
    """What turns the plain graph into the one TensorRT builds, in order, each step with its reason."""
    static = options.cache == "static"
    stage: Stage = "routed" if source.routing is not None else "injected"
    return [
        # Deepen first: routers are numbered in the deepened model.
        *([Step(_inject_layers(source), "injected")] if _injects(source) else []),
        # The masked form, its routers in fp32.
        *([Step(_route_layers(source), "routed")] if source.routing is not None else []),
        # A float32 MatMul may run in TF32, and not at all on Turing.
        *([Step(ReduceRouterProductsPass(), stage)] if source.routing is not None else []),
        # TensorRT builds no attention with a cache of its own, and updates a static one in place.
        Step(UseStaticCachePass(options.max_cache) if static else GrowCacheOutsideAttentionPass(), stage),
        # The mean of squares overflows fp16 and is too coarse in bf16.
        Step(ComputeNormsInFloat32Pass(), stage),
        # The head is the largest matrix: one row per sequence instead of one per prompt token.
        *([Step(KeepLastLogitsPass(), stage)] if options.last_logits else []),
        # The one lowering.
        *_tensorrt_lowering(options),
    ]


def _tensorrt_lowering(options: TensorRtOptions) -> list[Step]:
    match options.lowering:
        case "compact":
            return [Step(LowerSkipToTopKPass(options.max_batch * options.max_sequence), "selected")]
        case "if":
            return [Step(LowerSkipToIfPass(), "lowered")]
        case "plugin":
            return [Step(LowerSkipToPluginPass(), "plugged")]
        case _:
            return []


def build_tensorrt_model(source: ExportSource, options: TensorRtOptions, dtype: ir.DataType) -> ir.Model:
    """Builds the source's graph with TensorRT's interface.

    Args:
        source: A checkpoint; a foreign graph keeps the interface it has.
        options: What for.
        dtype: Of weights, KV cache and logits; routers and norms are fp32 whatever it is.

    Returns:
        The finished graph, strongly typed, its weights still lazy.

    Raises:
        InputError: The source or the options cannot be had, with all reasons.
        dlo_export.graph_passes.errors.GraphPassError: A layer is not what the lowering needs.
    """
    check_tensorrt_options(source, options)
    return _run_steps(source.plain_model(dtype), tensorrt_steps(source, options))


def check_tensorrt_options(source: ExportSource, options: TensorRtOptions) -> None:
    """Refuses what cannot be built, before anything is.

    Raises:
        InputError: With all reasons.
    """
    problems = []
    if source.kind == "onnx":
        problems.append(f"{source.base.path.name} is an ONNX graph, whose attention and cache stay what they are")
    for name in ("max_batch", "max_sequence", "max_cache"):
        if getattr(options, name) < 1:
            problems.append(f"--trt-{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if options.max_sequence > options.max_cache:
        problems.append(
            f"--trt-max-sequence {options.max_sequence} does not fit --trt-max-cache {options.max_cache}: "
            "a step's tokens go into the cache"
        )
    if options.last_logits and options.cache != "static":
        problems.append("--trt-last-logits needs --trt-cache static, which tells where a sequence ends")
    if problems:
        raise InputError("TensorRT: " + "; ".join(problems), hint="export the checkpoint with other --trt options")


def build_model(source: ExportSource, lowering: Lowering, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """Builds the source's graph and runs the pipeline on it.

    Args:
        source: What to export.
        lowering: What routed layers become.
        dtype: Of weights, KV cache and logits; a foreign graph keeps its own.

    Returns:
        The finished graph, its weights still lazy.

    Raises:
        dlo_export.graph_passes.errors.GraphPassError: The graph (a foreign one) is not what a pass needs.
        dlo_export.graph_passes.spec.invariants.GraphInvariantError: A stage broke its promise: a bug.
    """
    return _run_steps(source.plain_model(dtype), onnxruntime_steps(source, lowering))


def _run_steps(model: ir.Model, steps: list[Step]) -> ir.Model:
    check_order([step.graph_pass for step in steps])
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
