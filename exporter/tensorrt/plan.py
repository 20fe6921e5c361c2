"""What `--trt` and its options ask for, and what of it can be had: decided before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.exporter.graph_dtype import graph_dtype, sixteen_bits
from dlo_export.exporter.kernel_widths import check_kernel_widths
from dlo_export.exporter.lowering_choice import check_nothing_asked
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.sources.base_model import check_use
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.target_graphs import build_tensorrt_model, check_tensorrt_options
from dlo_export.exporter.tensorrt.backend import BackendChoice, check_backend, resolve_backend
from dlo_export.exporter.tensorrt.engine_cache import cache_limit
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.record import Workload
from dlo_export.graph_passes.lowerings.registry import (
    NOTHING_ROUTED,
    asked_lowering,
    lowerings_without_operators,
    suitable_lowerings,
)
from dlo_export.plugins.registration import check_library
from dlo_export.runtimes.artefact.engine_record import BackendName, EngineRecord, Phase

_MOST_BYTES = 1 << 40  # of one tensor or cache: more than a GPU has


@dataclasses.dataclass(frozen=True)
class TensorRtRequest:
    """The `--trt` options.

    Attributes:
        backend: "tensorrt", "rtx", or "auto": TensorRT where it and a GPU are there.
        targets: GPUs to build for, each of which counts once; none for every GPU of the backend (rtx) or this machine's
            (tensorrt).
        max_batch: Sequences per step at most.
        max_sequence: Tokens per sequence and step at most.
        max_cache: Tokens per sequence in the KV cache at most.
        cache: "static" or "growing".
        last_logits: Logits of each sequence's last token only.
        split: Two engines, prefill and decode, instead of one with two profiles.
        plugin_library: libdlo_plugins.so, for graphs lowered to plugins.
        timeout_s: Seconds per engine after which a build is killed; None never.
    """

    backend: BackendChoice = "auto"
    targets: tuple[str, ...] = ()
    max_batch: int = 4
    max_sequence: int = 512
    max_cache: int = 2048
    cache: Literal["static", "growing"] = "static"
    last_logits: bool = False
    split: bool = False
    plugin_library: Path | None = None
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedEngine:
    """One engine to be.

    Attributes:
        phase: What it runs.
        options: Of its graph.
        reason: Why that lowering.
        model: The graph, its weights still lazy.
    """

    phase: Phase
    options: TensorRtOptions
    reason: str
    model: ir.Model

    @property
    def name(self) -> str:
        """Stem of its files."""
        return "model" if self.phase == "both" else self.phase


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRtPlan:
    """What will be built.

    Attributes:
        request: What was asked for.
        backend: Who builds.
        backend_reason: Why.
        dtype: "fp16", "bf16" or "fp32", of weights, KV cache and logits.
        routing: What tokens of the source skip; None where nothing is routed.
        engines: One, or prefill and decode.
    """

    request: TensorRtRequest
    backend: BackendName
    backend_reason: str
    dtype: str
    routing: RoutingKind | None
    engines: tuple[PlannedEngine, ...]


def plan_tensorrt(source: ExportSource, request: TensorRtRequest, lowering: str, dtype: str) -> TensorRtPlan:
    """Decides everything and builds the graphs, so that what cannot be built is refused before anything starts.

    Args:
        source: What to export.
        request: The `--trt` options.
        lowering: --lowering: "auto" or the name of a lowering.
        dtype: --dtype: "auto", "fp32", "fp16" or "bf16".

    Raises:
        InputError: The source, the options or the plugin library cannot be had.
        dlo_export.graph_passes.errors.GraphPassError: A layer is not what the lowering needs.
        MachineError: The backend is not here.
    """
    # An engine holds its kernels once per GPU that the builder is told, however often it is told of one.
    request = dataclasses.replace(request, targets=tuple(dict.fromkeys(request.targets)))
    options = TensorRtOptions(
        NOTHING_ROUTED, request.cache, request.max_batch, request.max_sequence, request.max_cache, request.last_logits
    )
    check_use(source.base, "TensorRT")
    check_tensorrt_options(source, options)
    cache_limit()  # before the work: an engine that was built should not be lost to a variable
    if request.plugin_library is not None:
        check_library(request.plugin_library)
    backend, reason = resolve_backend(request.backend)
    check_backend(backend, request.targets)
    resolved = sixteen_bits(source.base.stored_dtype) if dtype == "auto" else dtype
    _check_size(source, request, resolved)
    phases: tuple[Phase, ...] = ("prefill", "decode") if request.split else ("both",)
    engines = tuple(_planned(source, request, phase, lowering, options, backend, resolved) for phase in phases)
    routing = None if source.routing is None else source.routing.kind
    return TensorRtPlan(request, backend, reason, resolved, routing, engines)


def graph_options(engine: EngineRecord) -> TensorRtOptions:
    """The options of the graph behind an engine."""
    names = [field.name for field in dataclasses.fields(TensorRtOptions)]
    return TensorRtOptions(**{name: getattr(engine, name) for name in names})


def _check_size(source: ExportSource, request: TensorRtRequest, dtype: str) -> None:
    """Refuses a KV cache or logits that no GPU holds.

    Raises:
        InputError: So.
    """
    config = source.base.config
    if config is None:
        return
    size = BY_OPTION[dtype].itemsize
    slots = request.max_batch * request.max_cache
    cache = 2 * source.num_layers * config.num_kv_heads * config.head_dim * size * slots
    rows = request.max_batch * (1 if request.last_logits else request.max_sequence)
    problems = [
        f"{what} of {of} takes {bytes_ >> 30} GB"
        for what, of, bytes_ in (
            (
                "a KV cache",
                f"--trt-max-batch {request.max_batch} with --trt-max-cache {request.max_cache} tokens",
                cache,
            ),
            ("logits", f"{rows} tokens (--trt-max-batch by --trt-max-sequence)", rows * config.vocab_size * size),
        )
        if bytes_ > _MOST_BYTES
    ]
    if problems:
        raise InputError(
            f"TensorRT: {'; '.join(problems)}, expected at most {_MOST_BYTES >> 30} GB: no GPU has more memory",
            hint="choose smaller --trt-max-batch, --trt-max-sequence or --trt-max-cache",
        )


def size_warnings(source: ExportSource, request: TensorRtRequest) -> list[str]:
    """What a user should know about the sizes asked for, one sentence each."""
    config, warnings = source.base.config, []
    if config is not None and request.max_cache > config.max_position_embeddings:
        warnings.append(
            f"--trt-max-cache {request.max_cache} is beyond the model's context of {config.max_position_embeddings} "
            "tokens: the slots behind it cost time in every step, and what is in them is not what the model was "
            "trained for"
        )
    return warnings


def _planned(
    source: ExportSource,
    request: TensorRtRequest,
    phase: Phase,
    lowering: str,
    options: TensorRtOptions,
    backend: BackendName,
    dtype: str,
) -> PlannedEngine:
    if phase == "decode":
        options = dataclasses.replace(options, max_sequence=1)
    if source.routing is None:
        check_nothing_asked(lowering, source.base.path, routers_removed=source.routers_removed)
        model = build_tensorrt_model(source, options, graph_dtype(dtype))
        return PlannedEngine(phase, options, "nothing is routed", model)
    if lowering != "auto":
        chosen = dataclasses.replace(options, lowering=asked_lowering(lowering, "tensorrt").name)
        return PlannedEngine(phase, chosen, "asked for", _built(source, chosen, dtype))
    return _best(source, options, phase, dtype, plugins_at_hand=backend == "tensorrt" or bool(request.plugin_library))


def _best(
    source: ExportSource, options: TensorRtOptions, phase: Phase, dtype: str, *, plugins_at_hand: bool
) -> PlannedEngine:
    """With the first lowering that suits and is possible. None of their reasons is a measured speed yet.

    Raises:
        GraphPassError: The last one that suits is not possible either.
    """
    assert source.routing is not None, "or there is nothing to choose"
    workload = Workload(phase, options.max_batch, options.max_sequence, plugins_at_hand, source.routing.kind)
    *candidates, last = suitable_lowerings("tensorrt", workload)
    refused = ""
    for record in candidates:
        chosen = dataclasses.replace(options, lowering=record.name)
        try:
            model = _built(source, chosen, dtype)
        except (GraphPassError, InputError) as error:
            refused += f"; {record.name} is not possible: {str(error).splitlines()[0]}"
        else:
            return PlannedEngine(phase, chosen, record.reason + refused, model)
    chosen = dataclasses.replace(options, lowering=last.name)
    return PlannedEngine(phase, chosen, last.reason + refused, _built(source, chosen, dtype))


def _built(source: ExportSource, options: TensorRtOptions, dtype: str) -> ir.Model:
    model = build_tensorrt_model(source, options, graph_dtype(dtype))
    hint = f"choose --lowering {' or '.join(lowerings_without_operators('tensorrt'))}"
    check_kernel_widths(model.graph, source.base.path, options.lowering, hint)
    return model
