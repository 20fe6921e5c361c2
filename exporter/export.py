"""`dlo-export`: from a model to an artefact folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.exporter.artifact import MODEL_NAME, WEIGHTS_NAME, describe, save_description
from dlo_export.exporter.client_config import client_config
from dlo_export.exporter.genai_config import genai_config
from dlo_export.exporter.model_metadata import set_model_metadata
from dlo_export.exporter.pipeline import Lowering, build_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.tensorrt.plan import DTYPES, TensorRtPlan, TensorRtRequest, plan_tensorrt
from dlo_export.exporter.weight_file import save_weights, weight_bytes
from dlo_export.runtimes.parity.report import ParityReport

DtypeChoice = Literal["auto", "fp32", "fp16", "bf16"]
LoweringChoice = Literal["auto", "masked", "compact", "if", "plugin"]


class ParityFailedError(Exception):
    """The artefact does not compute what the PyTorch reference computes.

    Args:
        report: What differed.
        kept: Where the artefact was put for inspection.
    """

    exit_code = 1

    def __init__(self, report: ParityReport, kept: Path) -> None:
        super().__init__(f"{report.summary()}\n\nhint: the artefact was kept in {kept} for inspection")
        self.report = report
        self.kept = kept


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """Arguments of `dlo-export`.

    Attributes:
        model: Checkpoint folder, `.gguf`, `.onnx`, or hub id in the local cache.
        output: Folder to make.
        adapter: DloAdapter folder.
        dtype: Of weights, KV cache and logits: of the engines where there are any (model.onnx is fp32 then).
        lowering: What routed layers become, in model.onnx and in engines; "plugin" in engines only.
        parity: Compare with PyTorch before the artefact appears.
        weights: False leaves `model.onnx.data` out: a graph to look at.
        force: Replace an existing output.
        trt: Build TensorRT engines too; None builds none.
    """

    model: str
    output: Path
    adapter: Path | None = None
    dtype: DtypeChoice = "auto"
    lowering: LoweringChoice = "auto"
    parity: bool = True
    weights: bool = True
    force: bool = False
    trt: TensorRtRequest | None = None


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
    description: dict[str, Any]
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
    source = open_source(request.model, request.adapter)
    try:
        plan = _plan_engines(request, source)
        # With engines, model.onnx stays the fp32 graph that parity runs on a CPU.
        dtype = _resolve_dtype(request.dtype, source) if plan is None else "fp32"
        choice = "auto" if plan is not None and request.lowering == "plugin" else request.lowering
        lowering, reason = resolve_lowering(choice, source)
        with whole_folder(request.output, overwrite=request.force) as folder:
            return _export_into(folder, request, source, dtype, (lowering, reason), plan, reporter)
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"{request.output}: the disk is full", hint="free some space; nothing was left behind"
            ) from err
        raise
    finally:
        source.close()


def resolve_lowering(choice: LoweringChoice, source: ExportSource) -> tuple[Lowering, str]:
    """The lowering for ONNX Runtime's CPU provider, and why.

    Raises:
        InputError: A lowering is asked for and nothing is routed.
    """
    if source.routing is None:
        if choice != "auto":
            raise InputError(
                f"{source.base.path}: has no routers, so --lowering {choice} has nothing to lower",
                hint="leave --lowering out, or give an adapter with routers (`dlo calibrate`)",
            )
        return "none", "nothing is routed"
    if choice == "plugin":
        raise InputError(
            "--lowering plugin: ONNX Runtime has no such operators",
            hint="plugins are TensorRT's: add --trt, or choose compact",
        )
    if choice == "auto":
        return "compact", "compaction skips work in prefill, batches and decode alike on ONNX Runtime's CPU kernels"
    return choice, "asked for"


def _resolve_dtype(choice: DtypeChoice, source: ExportSource) -> str:
    if source.kind == "onnx":
        if choice not in ("auto", "fp32"):
            raise InputError(
                f"{source.base.path}: --dtype {choice} asks for a cast, but a graph keeps its own dtype",
                hint="export the checkpoint instead, or leave --dtype out",
            )
        return "fp32"
    return "fp32" if choice == "auto" else choice


def _export_into(
    folder: Path,
    request: ExportRequest,
    source: ExportSource,
    dtype: str,
    lowering_and_reason: tuple[Lowering, str],
    plan: TensorRtPlan | None,
    reporter: Reporter,
) -> ExportResult:
    lowering, reason = lowering_and_reason
    # First, because a fault in one of these small files should not cost the time that weights take.
    source.base.save_companions(folder, client_config(source))
    generation = GenerationConfig.from_folder(folder)
    with reporter.stage("graph"):
        model = build_model(source, lowering, DTYPES[dtype])
        set_model_metadata(model, source, dtype=dtype, lowering=lowering)
    if request.weights:
        check_disk_space(folder, weight_bytes(model), folder.parent, "the weights need")
    with reporter.bytes("weights") as progress:
        save_weights(model, folder / WEIGHTS_NAME, write=request.weights, progress=progress)
    ir.save(model, folder / MODEL_NAME)
    with reporter.stage("description"):
        if source.base.config is not None:
            inputs = [value.name or "" for value in model.graph.inputs]
            values = genai_config(source.base.config, source.num_layers, generation, inputs)
            save_json(folder / "genai_config.json", values)
        description = describe(source, model, dtype=dtype, lowering=lowering, reason=reason)
    summary = _run_parity(folder, request, source, description, plan, reporter)
    if plan is not None:
        # Imported here: only these exports need what builds engines.
        from dlo_export.exporter.tensorrt.export import export_tensorrt  # noqa: PLC0415

        peak = _float16_peak(folder, request, source, plan, reporter)
        description["engines"] = [
            {**engine, "float16_stream_peak": peak} for engine in export_tensorrt(plan, folder, reporter)
        ]
    save_description(description, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return ExportResult(request.output, description, size, summary)


def _plan_engines(request: ExportRequest, source: ExportSource) -> TensorRtPlan | None:
    """What engines to build, every reason against it raised before anything is written."""
    if request.trt is None:
        return None
    if not request.weights:
        raise InputError("--no-weights and --trt: an engine holds the weights", hint="leave one of the two out")
    return plan_tensorrt(source, request.trt, request.lowering, request.dtype)


def _run_parity(
    folder: Path,
    request: ExportRequest,
    source: ExportSource,
    description: dict[str, Any],
    plan: TensorRtPlan | None,
    reporter: Reporter,
) -> str | None:
    if not request.parity or not request.weights:
        reason = "--no-parity" if not request.parity else "--no-weights"
        description["parity"] = {"verdict": "NOT RUN", "reason": reason}
        return None
    # Parity needs PyTorch; an export without it does not, and starts in a fraction of the time.
    from dlo_export.exporter.parity_check import check_parity  # noqa: PLC0415

    with reporter.stage("parity"):
        graphs = [engine.options for engine in plan.engines] if plan is not None else []
        report = check_parity(source, folder, description, graphs)
    description["parity"] = {"verdict": report.verdict, **({"reason": report.reason} if report.reason else {})}
    save_json(folder / "parity.json", report.to_json())
    if report.verdict == "FAIL":
        save_description(description, folder)
        failed = request.output.with_name(f"{request.output.name}.failed")
        if failed.exists():
            shutil.rmtree(failed)
        folder.rename(failed)
        raise ParityFailedError(report, failed)
    return report.summary()


def _float16_peak(
    folder: Path, request: ExportRequest, source: ExportSource, plan: TensorRtPlan, reporter: Reporter
) -> float | None:
    """Largest magnitude in the stream an engine is to hold in fp16; None where it is not, or nothing may be run."""
    if plan.dtype != "fp16" or not request.parity or source.base.config is None:
        return None
    from dlo_export.exporter.tensorrt.float16_range import LARGEST, float16_stream_peak, near_overflow  # noqa: PLC0415

    with reporter.stage("range of the residual stream"):
        peak = float16_stream_peak(folder, source.base.config)
    if near_overflow(peak):
        reporter.warn(f"the residual stream reaches {peak:.0f}, fp16 ends at {LARGEST:.0f}: bf16 is safer")
    return peak
