"""What an export proves of its artefact before that appears: parity, and that fp16 holds the residual stream."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dlo_export.checkpoints.errors import DloError
from dlo_export.checkpoints.files.json_file import finite, save_json
from dlo_export.checkpoints.files.whole_folder import keep_aside
from dlo_export.exporter.artefact_description import complete_description
from dlo_export.exporter.export_request import ExportRequest
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.exporter.tensorrt.plan import TensorRtPlan
from dlo_export.runtimes.artefact.description import MODEL_NAME, PARITY_NAME, ArtefactDescription
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


def run_parity(
    folder: Path,
    request: ExportRequest,
    source: ExportSource,
    description: ArtefactDescription,
    plan: TensorRtPlan | None,
    reporter: Reporter,
) -> tuple[ParityVerdict, str | None]:
    """Compares an artefact with PyTorch, and writes the report into its folder.

    Args:
        folder: Of the artefact, under way; kept aside where parity fails.
        request: What was asked for.
        source: The model.
        description: Of the artefact, without a verdict.
        plan: Of its engines; None without any.
        reporter: Told about the stage, and of what could not be compared.

    Returns:
        The verdict, and the report in words; None where parity was not asked for.

    Raises:
        ParityFailedError: It failed.
    """
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


def float16_peak(
    folder: Path, request: ExportRequest, source: ExportSource, plan: TensorRtPlan, reporter: Reporter
) -> float | None:
    """Largest magnitude in the stream an engine is to hold in fp16; None where it is not, or nothing may be run.

    Args:
        folder: Of the artefact, with its graph and weights.
        request: What was asked for.
        source: The model.
        plan: Of its engines.
        reporter: Told about the stage, and warned of values near the largest.
    """
    if plan.dtype != "fp16" or not (request.parity and request.weights) or source.base.config is None:
        return None
    from dlo_export.exporter.tensorrt.float16_range import LARGEST, float16_stream_peak, near_overflow  # noqa: PLC0415

    with reporter.stage("range of the residual stream"):
        peak = float16_stream_peak(folder, source.base.config)
    if near_overflow(peak):
        reporter.warn(f"the residual stream reaches {peak:.0f}, fp16 ends at {LARGEST:.0f}: bf16 is safer")
    return peak
