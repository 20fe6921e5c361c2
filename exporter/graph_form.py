"""What model.onnx is to be, and the graph of that form: its type, what routed layers become in it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.exporter.export_request import ExportRequest
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.kernel_widths import check_kernel_widths
from dlo_export.exporter.lowering_choice import LoweredModel, choose_onnxruntime_lowering
from dlo_export.exporter.model_metadata import set_model_metadata
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.static_slots import check_slots
from dlo_export.exporter.target_graphs import build_captured_model, build_model, check_static_cache
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS, LoweringRecord, Target
from dlo_export.graph_passes.lowerings.registry import find_lowering, lowering_names, lowerings_without_operators
from dlo_export.plugins.ort_registration import check_library
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER


@dataclasses.dataclass(frozen=True)
class GraphForm:
    """What model.onnx is to be.

    Attributes:
        dtype: Of weights, KV cache and logits: "fp32", "fp16" or "bf16".
        lowering: What routed layers become; "none" where nothing is routed.
        reason: Why that.
    """

    dtype: str
    lowering: str
    reason: str


def graph_form(request: ExportRequest, source: ExportSource, *, beside_engines: bool) -> GraphForm:
    """Chooses it; with engines, model.onnx stays what parity runs on a CPU.

    Args:
        request: What is asked for.
        source: The model.
        beside_engines: Whether engines are built too.

    Raises:
        InputError: The type, the lowering or the static cache does not suit the model, with the reason.
        GraphPassError: The source's graph is not what a pass needs.
        PluginLibraryError: The lowering needs a library that cannot be used.
    """
    if beside_engines:
        dtype = source.base.dtype_beside_engines
    else:
        dtype = source.base.graph_dtype(request.dtype, request.provider)
    if request.static_cache is not None:
        check_slots(source, request.static_cache, dtype)
    target, library = PROVIDER_TARGETS[request.provider], request.ort_plugin_library
    engines_only = beside_engines and not _runs_everywhere(request.lowering, target)
    asked = "auto" if engines_only else request.lowering
    lowering, reason = choose_onnxruntime_lowering(
        asked,
        dtype,
        LoweredModel(
            source.base.path,
            routing=None if source.routing is None else source.routing.kind,
            hidden_size=None if source.base.config is None else source.base.config.hidden_size,
            check=lambda record: _check_possible(request, source, dtype, record),
            routers_removed=source.routers_removed,
        ),
        provider=request.provider,
        library_at_hand=library is not None,
        captured=request.captured,
    )
    if request.static_cache is not None:
        check_static_cache(dtype, request.provider)
    if library is not None and find_lowering(lowering, target).domains:
        check_library(library)
    return GraphForm(dtype, lowering, reason)


def _check_possible(request: ExportRequest, source: ExportSource, dtype: str, record: LoweringRecord) -> None:
    """Refuses a lowering whose operators do not compute the source's MLPs, before anything is written.

    Raises:
        InputError: So.
    """
    if not record.domains:
        return  # a target's own operators compute every MLP
    target = PROVIDER_TARGETS[request.provider]
    assert source.routing is not None, "or nothing is lowered"
    others = " or ".join(lowerings_without_operators(target, source.routing.kind))
    hint = (
        "choose --lowering masked, or leave --static-cache out" if request.captured else f"choose --lowering {others}"
    )
    graph = _lowered(request, source, record.name, dtype).graph
    check_kernel_widths(graph, source.base.path, record.name, hint)


def _lowered(request: ExportRequest, source: ExportSource, lowering: str, dtype: str) -> ir.Model:
    """The graph in a lowering, its weights still lazy: a new one with every call.

    Raises:
        GraphPassError: The source's graph is not what a pass needs, by the source's name.
    """
    of, target, slots = graph_dtype(dtype), PROVIDER_TARGETS[request.provider], request.static_cache
    try:
        if request.captured:
            assert slots is not None, "what captured asks"
            return build_captured_model(source, lowering, slots, of, target)
        return build_model(source, lowering, of, target, last_logits=request.last_logits, static_cache=slots)
    except GraphPassError as err:
        raise GraphPassError(f"{source.base.path}: {err.message}", hint=err.hint) from err


def built_graph(request: ExportRequest, source: ExportSource, form: GraphForm) -> ir.Model:
    """The finished graph, its weights still lazy; somebody else's has been loaded by ONNX Runtime.

    Raises:
        GraphPassError: The source's graph is not what a pass needs.
        InputError: ONNX Runtime does not load, or run, what was made of somebody's graph.
    """
    model = _lowered(request, source, form.lowering, form.dtype)
    set_model_metadata(model, source, dtype=form.dtype, lowering=form.lowering)
    if not source.base.is_built_here:
        # Imported here: an export that runs nothing starts in less time and memory without ONNX Runtime.
        from dlo_export.exporter.load_check import check_loads  # noqa: PLC0415

        provider, library = BY_PROVIDER[request.provider], request.ort_plugin_library
        check_loads(model, source.base.path, form.dtype, provider, library, steps=not request.parity)
    return model


def _runs_everywhere(lowering: str, target: Target) -> bool:
    """Whether ONNX Runtime has a lowering, or "auto", by itself: model.onnx beside engines needs no library."""
    return lowering == "auto" or (lowering in lowering_names(target) and not find_lowering(lowering, target).domains)
