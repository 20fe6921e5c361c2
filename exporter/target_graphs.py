"""A source's graph for each target: what cannot be had so is refused, then the target's pass list runs over it."""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.pipeline import (
    GraphSource,
    TensorRtOptions,
    captured_steps,
    onnxruntime_steps,
    run_steps,
    tensorrt_steps,
)
from dlo_export.graph_passes.lowerings.record import Target
from dlo_export.graph_passes.lowerings.registry import NOTHING_ROUTED, find_lowering, skipping_lowerings
from dlo_export.graph_passes.spec.invariants import PLAIN, check_stage
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER
from dlo_export.runtimes.onnxruntime.providers import GROUP_QUERY_ATTENTION


class EngineSource(GraphSource, Protocol):
    """What a graph for TensorRT asks besides."""

    def engine_model(self, dtype: ir.DataType) -> ir.Model:
        """The graph before any pass for TensorRT, which is ours whatever the source is: a new one with every call."""
        ...


def build_model(
    source: GraphSource,
    lowering: str,
    dtype: ir.DataType = ir.DataType.FLOAT,
    target: Target = "onnxruntime-cpu",
    *,
    last_logits: bool = False,
    static_cache: int | None = None,
    compared_with: str | None = None,
) -> ir.Model:
    """Builds the source's graph for ONNX Runtime.

    Args:
        source: What to export.
        lowering: Name of what routed layers become.
        dtype: Of weights, KV cache and logits; a foreign graph keeps its own.
        target: What it is to run on.
        last_logits: Compute the logits of each sequence's last token only.
        static_cache: Slots of a cache that is written in place, per sequence; None lets it grow.
        compared_with: Name of the lowering of a graph that this one is held against: all around routed blocks is done
            as for that one.

    Returns:
        The finished graph, its weights still lazy.

    Raises:
        InputError: ONNX Runtime has no such lowering.
        dlo_export.graph_passes.errors.GraphPassError: The graph (a foreign one) is not what a pass needs.
        dlo_export.graph_passes.spec.invariants.GraphInvariantError: A stage broke its promise: a bug.
    """
    record = find_lowering(lowering, target)
    other = None if compared_with is None else find_lowering(compared_with, target)
    steps = onnxruntime_steps(
        source, record, target, last_logits=last_logits, static_cache=static_cache, compared_with=other
    )
    return run_steps(_plain(source, dtype), steps)


def build_captured_model(
    source: GraphSource,
    lowering: str,
    max_cache: int,
    dtype: ir.DataType = ir.DataType.FLOAT,
    target: Target = "onnxruntime-cuda",
    *,
    fuse_routers: bool = True,
) -> ir.Model:
    """Builds the source's graph for ONNX Runtime with a cache of fixed size, updated in place.

    Args:
        source: A checkpoint; a foreign graph keeps the interface it has.
        lowering: Name of what routed layers become.
        max_cache: Slots of the cache, per sequence.
        dtype: Of weights, KV cache and logits.
        target: What it is to run on.
        fuse_routers: Let the dlo operators' library compute routers' scores too, where it is needed anyway.

    Returns:
        The finished graph, its weights still lazy.

    Raises:
        InputError: The source or the lowering cannot be had so, with all reasons.
        dlo_export.graph_passes.errors.GraphPassError: A layer is not what the lowering or the cache needs.
    """
    record = find_lowering(lowering, "onnxruntime-cuda")
    problems = [] if record.not_capturable is None else [f"--lowering {lowering}: {record.not_capturable}"]
    routing = None if source.routing is None else source.routing.kind
    if attention_routed := routing not in (None, "mlp"):
        skipped = f"{routing} routing skips or masks attention"
        problems.append(f"{skipped}, and the operator that attends to one cache does neither")
    if max_cache < 1:
        problems.append(f"a cache of {max_cache} slots, expected at least 1")
    if problems:
        raise InputError(
            f"a static cache for ONNX Runtime: {'; '.join(problems)}",
            hint="export without it" + ("" if attention_routed else ", or choose --lowering plugin"),
        )
    steps = captured_steps(source, record, max_cache, target, fuse_routers=fuse_routers)
    return run_steps(_plain(source, dtype), steps)


def check_static_cache(dtype: str, provider: ProviderOption) -> None:
    """Refuses a type for which a provider lacks attention on a cache that is written in place.

    Raises:
        InputError: With the reason.
    """
    kind, runs_it = BY_OPTION[dtype], BY_PROVIDER[provider]
    gap = runs_it.why_not_run(kind, {GROUP_QUERY_ATTENTION})
    if gap is not None and runs_it.why_not_run(kind) is None:  # else nothing of this type runs there at all
        raise InputError(f"--static-cache with --dtype {dtype}: {gap}", hint="choose another --dtype")


def build_tensorrt_model(source: EngineSource, options: TensorRtOptions, dtype: ir.DataType) -> ir.Model:
    """Builds the source's graph with TensorRT's interface.

    Args:
        source: What to export.
        options: What for.
        dtype: Of weights, KV cache and logits; routers and norms are fp32 whatever it is.

    Returns:
        The finished graph, strongly typed, its weights still lazy.

    Raises:
        InputError: The source or the options cannot be had, with all reasons.
        dlo_export.graph_passes.errors.GraphPassError: A layer is not what the lowering needs.
    """
    check_tensorrt_options(source, options)
    model = source.engine_model(dtype)
    check_stage(model, PLAIN)
    return run_steps(model, tensorrt_steps(source, options))


def check_tensorrt_options(source: GraphSource, options: TensorRtOptions) -> None:
    """Refuses what cannot be built, before anything is.

    Raises:
        InputError: With all reasons.
    """
    problems: list[str] = []
    routing = None if source.routing is None else source.routing.kind
    if routing not in (None, "mlp") and options.cache != "static":
        problems.append(f"{routing} routing needs --trt-cache static: who may be seen is kept beside its slots")
    if routing is not None and options.lowering != NOTHING_ROUTED:
        asked = find_lowering(options.lowering, "tensorrt")
        if routing not in asked.routing:
            choices = ", ".join(record.name for record in skipping_lowerings("tensorrt", routing))
            problems.append(f"--lowering {asked.name} takes {' and '.join(asked.routing)} routing: choose {choices}")
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


def _plain(source: GraphSource, dtype: ir.DataType) -> ir.Model:
    model = source.plain_model(dtype)
    check_stage(model, PLAIN)
    return model
