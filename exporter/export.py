"""`dlo-export`: from a model to an artefact folder, whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtype_options import DTYPE_CHOICES
from dlo_export.checkpoints.errors import DloError, InputError
from dlo_export.checkpoints.files.disk_space import check_disk_space, no_room_reported
from dlo_export.checkpoints.files.folder_kind import FolderKind
from dlo_export.checkpoints.files.json_file import finite, save_json
from dlo_export.checkpoints.files.output_check import check_output_folder
from dlo_export.checkpoints.files.whole_folder import keep_aside, whole_folder
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.exporter.artefact_description import complete_description, describe
from dlo_export.exporter.background import BackgroundValue
from dlo_export.exporter.client_config import client_config
from dlo_export.exporter.genai_config import (
    GENAI_CONFIG_NAME,
    WHY_NONE,
    WHY_NONE_STATIC,
    carried_genai_config,
    genai_config,
    with_operator_library,
)
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.kept_data import kept_files, kept_names, new_weights_name
from dlo_export.exporter.kernel_widths import check_kernel_widths
from dlo_export.exporter.lowering_choice import LoweredModel, choose_onnxruntime_lowering
from dlo_export.exporter.model_metadata import set_model_metadata
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.reduced_source import without_layers
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.static_slots import beyond_context, check_slots
from dlo_export.exporter.target_graphs import build_captured_model, build_model, check_static_cache
from dlo_export.exporter.tensorrt.plan import TensorRtPlan, TensorRtRequest, plan_tensorrt, size_warnings
from dlo_export.exporter.weight_file import leave_weights_out, save_weights, weight_bytes
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS, LoweringRecord, Target
from dlo_export.graph_passes.lowerings.registry import find_lowering, lowering_names, lowerings_without_operators
from dlo_export.plugins.ort_registration import check_library
from dlo_export.runtimes.artefact.description import (
    ENGINES_NAME,
    MODEL_NAME,
    PARITY_NAME,
    WEIGHTS_NAME,
    ArtefactDescription,
    KeptData,
    load_description,
)
from dlo_export.runtimes.artefact.engine_record import ParityVerdict
from dlo_export.runtimes.errors import ProviderUnavailableError
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER
from dlo_export.runtimes.parity.report import ParityReport


class ParityFailedError(DloError):
    """The artefact does not compute what the PyTorch reference computes.

    Args:
        report: What differed.
        kept: Where the artefact was put for inspection.
        doubt: What else than the artefact may be wrong.
    """

    exit_code = 1

    def __init__(self, report: ParityReport, kept: Path, doubt: str | None = None) -> None:
        hints = [f"the artefact was kept in {kept} for inspection", *([doubt] if doubt else [])]
        super().__init__(report.summary(), hint="; ".join(hints))
        self.report = report
        self.kept = kept


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """Arguments of `dlo-export`.

    Attributes:
        model: Checkpoint folder, `.gguf`, `.onnx`, or hub id in the local cache.
        output: Folder to make.
        adapter: DloAdapter folder.
        dtype: One of DTYPE_CHOICES, of weights, KV cache and logits: of the engines where there are any (model.onnx is
            fp32 then).
        lowering: "auto", or the name of what routed layers become, in engines where there are any. model.onnx gets
            the same where ONNX Runtime has it by itself, else what "auto" chooses.
        parity: Compare with PyTorch before the artefact appears.
        weights: False leaves `model.onnx.data` out, and reads no weight of the model's: a graph to look at, and to
            compile.
        weight_file_bytes: Of a file of weights at most; None puts all into one.
        force: Replace an artefact of this program's.
        allow_nonfinite: Let weights be NaN or infinite.
        force_base: Let the adapter be made from other weights.
        trt: Build TensorRT engines too; None builds none.
        ort_plugin_library: libdlo_ort.so, with which parity runs the plugin lowering.
        last_logits: Have model.onnx compute the logits of each sequence's last token only.
        remove_identity: Leave layers out that pass everything on.
        provider: Of ONNX Runtime, that model.onnx is made for, and parity runs on where it is there.
        static_cache: Tokens per sequence in a KV cache that ONNX Runtime writes in place, and on a GPU a CUDA graph
            captures a decode step with; None lets the cache grow.
        link_weights: Make hard links, not copies, of a graph's data files that stay as they are.

    Raises:
        InputError: There is no such dtype, or options contradict each other.
    """

    model: str
    output: Path
    adapter: Path | None = None
    dtype: str = "auto"
    lowering: str = "auto"
    parity: bool = True
    weights: bool = True
    weight_file_bytes: int | None = None
    force: bool = False
    allow_nonfinite: bool = False
    force_base: bool = False
    trt: TensorRtRequest | None = None
    ort_plugin_library: Path | None = None
    last_logits: bool = False
    remove_identity: bool = False
    provider: ProviderOption = "cpu"
    static_cache: int | None = None
    link_weights: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_CHOICES:
            raise InputError(f"--dtype {self.dtype}: no such type", hint=f"choose one of {', '.join(DTYPE_CHOICES)}")
        if self.trt is not None and self.provider != "cpu":
            raise InputError(
                f"--provider {self.provider} and --trt: beside engines, model.onnx is the fp32 graph that proves them "
                "on a CPU",
                hint="export twice, once with each",
            )
        if self.last_logits and self.captured:
            raise InputError(
                f"--last-logits and --static-cache with --provider {self.provider}: steps that are captured give every "
                "token's logits, of which the last row alone leaves the device",
                hint="leave --last-logits out",
            )
        if self.link_weights and not self.weights:
            raise InputError(
                "--link-weights and --no-weights: there is nothing to link where no weights are written",
                hint="leave one of the two out",
            )
        if self.trt is not None and self.static_cache is not None:
            raise InputError(
                "--static-cache and --trt: engines have a cache of their own, --trt-max-cache is its size",
                hint="leave one of the two out",
            )

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is to capture a decode step of model.onnx."""
        return self.static_cache is not None and self.provider != "cpu"

    @property
    def inputs(self) -> tuple[Path | None, ...]:
        """What is read, as far as it is given and no hub id: never replaced."""
        engine_library = self.trt.plugin_library if self.trt is not None else None
        return Path(self.model), self.adapter, engine_library, self.ort_plugin_library


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
        form = _graph_form(request, source, beside_engines=plan is not None)
        if request.static_cache is not None and (told := beyond_context(source, request.static_cache)):
            reporter.warn(told)
        with no_room_reported(request.output), whole_folder(request.output, overwrite=request.force) as folder:
            summary = _export_into(folder, request, source, form, plan, reporter)
        size = sum(file.stat().st_size for file in request.output.rglob("*") if file.is_file())
        # Read back: what others will read is what is returned.
        return ExportResult(request.output, load_description(request.output), size, summary)
    finally:
        source.close()


@dataclasses.dataclass(frozen=True)
class _GraphForm:
    """What model.onnx is to be: its type, what routed layers become in it, and why that."""

    dtype: str
    lowering: str
    reason: str


def _graph_form(request: ExportRequest, source: ExportSource, *, beside_engines: bool) -> _GraphForm:
    """With engines, model.onnx stays what parity runs on a CPU."""
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
    return _GraphForm(dtype, lowering, reason)


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


def _export_into(
    folder: Path,
    request: ExportRequest,
    source: ExportSource,
    form: _GraphForm,
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
        model = _built_graph(request, source, form)
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
    peak = None if plan is None else _float16_peak(folder, request, source, plan, reporter)
    parity, summary = _run_parity(folder, request, source, description, plan, reporter)
    description = dataclasses.replace(description, parity=parity)
    # An engine holds the weights: without them its graph is all there can be.
    if plan is not None and request.weights:
        engines = build_planned_engines(plan, folder / ENGINES_NAME, reporter, peak)
        description = dataclasses.replace(description, engines=engines)
    with reporter.stage("hashes"):
        complete_description(description, folder)
    return summary


def _built_graph(request: ExportRequest, source: ExportSource, form: _GraphForm) -> ir.Model:
    """The finished graph, its weights still lazy; somebody else's has been loaded by ONNX Runtime."""
    model = _lowered(request, source, form.lowering, form.dtype)
    set_model_metadata(model, source, dtype=form.dtype, lowering=form.lowering)
    if not source.base.is_built_here:
        # Imported here: an export that runs nothing starts in less time and memory without ONNX Runtime.
        from dlo_export.exporter.load_check import check_loads  # noqa: PLC0415

        provider, library = BY_PROVIDER[request.provider], request.ort_plugin_library
        check_loads(model, source.base.path, form.dtype, provider, library, steps=not request.parity)
    return model


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


def _runs_everywhere(lowering: str, target: Target) -> bool:
    """Whether ONNX Runtime has a lowering, or "auto", by itself: model.onnx beside engines needs no library."""
    return lowering == "auto" or (lowering in lowering_names(target) and not find_lowering(lowering, target).domains)


def _run_parity(
    folder: Path,
    request: ExportRequest,
    source: ExportSource,
    description: ArtefactDescription,
    plan: TensorRtPlan | None,
    reporter: Reporter,
) -> tuple[ParityVerdict, str | None]:
    if not request.parity or not request.weights:
        reason = "--no-parity" if not request.parity else "--no-weights"
        return ParityVerdict("NOT RUN", reason), None
    # Parity needs PyTorch; an export without it does not, and starts in a fraction of the time.
    from dlo_export.exporter.parity_check import MOST_TOKENS, check_parity, doubt_about_kernels  # noqa: PLC0415

    with reporter.stage("parity"):
        graphs = [engine.options for engine in plan.engines] if plan is not None else []
        if any(options.max_cache < MOST_TOKENS for options in graphs):
            reporter.warn(f"--trt-max-cache is below {MOST_TOKENS}: parity's cases are cut to fit")
        try:
            report = check_parity(
                source,
                folder,
                description,
                graphs,
                request.ort_plugin_library,
                provider=BY_PROVIDER[request.provider],
            )
        except ProviderUnavailableError as err:
            # Not this machine's to prove: the artefact is for one that has the provider.
            report = ParityReport.not_run(err.message)
            reporter.warn(f"parity is NOT RUN: {err.message}")
    parity = ParityVerdict(report.verdict, report.reason or None)
    save_json(folder / PARITY_NAME, finite(report.to_json()))
    if report.verdict == "FAIL":
        complete_description(dataclasses.replace(description, parity=parity), folder)
        doubt = doubt_about_kernels(load_graph(folder / MODEL_NAME), description, BY_PROVIDER[request.provider])
        failed = keep_aside(folder, request.output.with_name(f"{request.output.name}.failed"), request.inputs)
        raise ParityFailedError(report, failed, doubt)
    return parity, report.summary()


def _float16_peak(
    folder: Path, request: ExportRequest, source: ExportSource, plan: TensorRtPlan, reporter: Reporter
) -> float | None:
    """Largest magnitude in the stream an engine is to hold in fp16; None where it is not, or nothing may be run."""
    if plan.dtype != "fp16" or not (request.parity and request.weights) or source.base.config is None:
        return None
    from dlo_export.exporter.tensorrt.float16_range import LARGEST, float16_stream_peak, near_overflow  # noqa: PLC0415

    with reporter.stage("range of the residual stream"):
        peak = float16_stream_peak(folder, source.base.config)
    if near_overflow(peak):
        reporter.warn(f"the residual stream reaches {peak:.0f}, fp16 ends at {LARGEST:.0f}: bf16 is safer")
    return peak
