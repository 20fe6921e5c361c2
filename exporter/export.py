"""`dlo-export`: from a model to an artefact folder, whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.disk_space import check_disk_space, no_room_reported
from dlo_export.checkpoints.files.folder_kind import FolderKind
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.checkpoints.files.output_check import check_output_folder
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.exporter.artefact_description import complete_description, describe
from dlo_export.exporter.background import BackgroundValue
from dlo_export.exporter.client_config import client_config
from dlo_export.exporter.export_parity import ParityFailedError, float16_peak, run_parity
from dlo_export.exporter.export_request import ExportRequest
from dlo_export.exporter.genai_config import (
    GENAI_CONFIG_NAME,
    WHY_NONE,
    WHY_NONE_STATIC,
    carried_genai_config,
    genai_config,
    with_operator_library,
)
from dlo_export.exporter.graph_form import GraphForm, built_graph, graph_form
from dlo_export.exporter.kept_data import kept_files, kept_names, new_weights_name
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.reduced_source import without_layers
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.static_slots import beyond_context
from dlo_export.exporter.tensorrt.plan import TensorRtPlan, plan_tensorrt, size_warnings
from dlo_export.exporter.weight_file import leave_weights_out, save_weights, weight_bytes
from dlo_export.runtimes.artefact.description import (
    ENGINES_NAME,
    MODEL_NAME,
    WEIGHTS_NAME,
    ArtefactDescription,
    KeptData,
    load_description,
)

__all__ = ["ExportRequest", "ExportResult", "ParityFailedError", "export_model"]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was made.

    Attributes:
        folder: The artefact.
        description: Its dlo_artifact.json.
        bytes: Of all its files.
        parity_summary: The parity report in words; None where parity was not asked for.
    """

    folder: Path
    description: ArtefactDescription
    bytes: int
    parity_summary: str | None


def export_model(request: ExportRequest, reporter: Reporter) -> ExportResult:
    """Exports a model.

    Args:
        request: What to export and how.
        reporter: Told about stages and bytes.

    Raises:
        InputError: The model, the adapter or the combination of options is not exportable.
        MachineError: The disk is full.
        ParityFailedError: The artefact is not equal to its reference.
    """
    check_output_folder(request.output, overwrite=request.force, makes=FolderKind.ARTEFACT, inputs=request.inputs)
    source = open_source(
        request.model,
        request.adapter,
        allow_nonfinite=request.allow_nonfinite,
        force_base=request.force_base,
        weights=request.weights,
        engines=request.trt is not None,
    )
    try:
        for warning in source.warnings:
            reporter.warn(warning)
        if request.link_weights and not source.base.data_files:
            raise InputError(
                f"{source.base.path}: --link-weights is for a graph whose weights lie in data files beside it",
                hint="leave --link-weights out: these weights are written anew",
            )
        if request.remove_identity:
            source = without_layers(source, source.identity_layers())
            if not source.removed_layers:
                reporter.warn("--remove-identity: no layer passes everything on, so none is removed")
        plan = _plan_engines(request, source, reporter)
        form = graph_form(request, source, beside_engines=plan is not None)
        if request.static_cache is not None and (told := beyond_context(source, request.static_cache)):
            reporter.warn(told)
        with no_room_reported(request.output), whole_folder(request.output, overwrite=request.force) as folder:
            summary = _export_into(folder, request, source, form, plan, reporter)
        size = sum(file.stat().st_size for file in request.output.rglob("*") if file.is_file())
        # Read back: what others will read is what is returned.
        return ExportResult(request.output, load_description(request.output), size, summary)
    finally:
        source.close()


def _export_into(
    folder: Path,
    request: ExportRequest,
    source: ExportSource,
    form: GraphForm,
    plan: TensorRtPlan | None,
    reporter: Reporter,
) -> str | None:
    """Writes a whole artefact; returns what parity found, in words."""
    # First, because a fault in one of these small files should not cost the time that weights take.
    source.base.save_companions(folder, client_config(source))
    own = source.base.path
    generation = GenerationConfig.from_folder(folder, origin=own if own.is_dir() else own.parent)
    # Reads every weight once more, on another core than the one that writes them; but of files that are kept, whoever
    # keeps them has the hash.
    sha256: Callable[[], str | None] = source.base.sha256 if request.weights else lambda: None
    if not source.base.data_files:
        sha256 = BackgroundValue(sha256).result
    with reporter.stage("graph"):
        model = built_graph(request, source, form)
    if plan is not None:
        # Imported here: only these exports need what builds engines.
        from dlo_export.exporter.tensorrt.export import build_planned_engines, save_graphs  # noqa: PLC0415

        # Before weights and parity, which take long: it finds what the engines' type cannot hold.
        save_graphs(plan, folder / ENGINES_NAME, reporter, weights=request.weights)
    kept_data = _save_all_weights(model, folder, request, source, reporter)
    ir.save(model, folder / MODEL_NAME)
    with reporter.stage("description"):
        if request.static_cache is not None:
            reporter.warn(WHY_NONE_STATIC)
        elif source.remembers_activity:
            reporter.warn(WHY_NONE)
        elif (values := _client_settings(source, generation, model, request.provider)) is not None:
            save_json(folder / GENAI_CONFIG_NAME, values)
        description = describe(
            source,
            model,
            sha256=sha256(),
            dtype=form.dtype,
            provider=request.provider,
            lowering=form.lowering,
            reason=form.reason,
            kept_data=kept_data,
        )
    peak = None if plan is None else float16_peak(folder, request, source, plan, reporter)
    parity, summary = run_parity(folder, request, source, description, plan, reporter)
    description = dataclasses.replace(description, parity=parity)
    # An engine holds the weights: without them its graph is all there can be.
    if plan is not None and request.weights:
        engines = build_planned_engines(plan, folder / ENGINES_NAME, reporter, peak)
        description = dataclasses.replace(description, engines=engines)
    with reporter.stage("hashes"):
        complete_description(description, folder)
    return summary


def _save_all_weights(
    model: ir.Model, folder: Path, request: ExportRequest, source: ExportSource, reporter: Reporter
) -> tuple[KeptData, ...]:
    """Has all weights in the folder, in files of somebody's graph that are kept and in new ones; or none."""
    if not request.weights:
        leave_weights_out(model, folder / WEIGHTS_NAME, file_bytes=request.weight_file_bytes)
        return ()
    kept = kept_files(model, source.base.data_files, request.weight_file_bytes)
    names = kept_names(kept)
    if request.link_weights and not kept:
        reporter.warn(
            "--link-weights: nothing is linked, of each data file the new graph reads too little, or it is too large"
        )
    placed = [(file, file.place(folder, link=request.link_weights)) for file in kept]
    copied = sum(file.bytes for file, how in placed if how == "copy")
    check_disk_space(folder, copied + weight_bytes(model, names), folder.parent, "the weights need")
    kept_data = []
    for file, how in placed:
        with reporter.bytes(file.name) as progress:
            kept_data.append(file.read_through(folder, how, progress, allow_nonfinite=request.allow_nonfinite))
    with reporter.bytes("weights") as progress:
        save_weights(
            model,
            folder / new_weights_name(kept),
            kept=names,
            file_bytes=request.weight_file_bytes,
            progress=progress,
            allow_nonfinite=request.allow_nonfinite,
        )
    return tuple(kept_data)


def _client_settings(
    source: ExportSource, generation: GenerationConfig, model: ir.Model, provider: ProviderOption
) -> dict[str, Any] | None:
    """genai_config.json: what stood beside somebody's graph, of the new depth; else what fits the graph."""
    if (given := source.base.client_settings) is not None:
        settings = carried_genai_config(given, source.num_layers, routed=source.routing is not None)
    elif source.base.config is not None:
        inputs = [value.name or "" for value in model.graph.inputs]
        settings = genai_config(source.base.config, source.num_layers, generation, inputs, provider)
    else:
        return None
    return with_operator_library(settings, needed=bool(plugin_operators(model)))


def _plan_engines(request: ExportRequest, source: ExportSource, reporter: Reporter) -> TensorRtPlan | None:
    """What engines to build, every reason against it raised before anything is written."""
    if request.trt is None:
        return None
    plan = plan_tensorrt(source, request.trt, request.lowering, request.dtype)
    for warning in size_warnings(source, request.trt):
        reporter.warn(warning)
    return plan
