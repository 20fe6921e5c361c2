"""`dlo parity`: compare an artefact with the PyTorch model it was made from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dlo_export.runtimes.parity.layer_report import LayerReport
    from dlo_export.runtimes.parity.report import ParityReport

from dlo_export.exporter.commands.shared_options import (
    AllowNonfinite,
    Device,
    ForceBase,
    OrtPluginLibrary,
    Provider,
    Verbose,
    naming_allow_nonfinite,
)

NAME = "parity"


def main(
    artefact: Annotated[Path, typer.Argument(help="Folder that dlo-export wrote.")],
    model: Annotated[str, typer.Argument(help="What it was made from: checkpoint folder, .gguf, .onnx, hub id.")],
    adapter: Annotated[Path | None, typer.Option(help="The adapter it was made with.")] = None,
    allow_nonfinite: AllowNonfinite = False,
    force_base: ForceBase = False,
    provider: Provider = None,
    device: Device = "cpu",
    ort_plugin_library: OrtPluginLibrary = None,
    by_layer: Annotated[
        bool,
        typer.Option("--by-layer", help="A layer at a time: names the first that differs, and needs memory for one."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Compare an artefact with PyTorch: decisions, logits, greedy tokens. Exit code 1: it fails; 4: it cannot run."""
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415
    from dlo_export.exporter.artefact_check import open_description  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.exit_codes import MACHINE, PARITY_FAILED  # noqa: PLC0415
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.layer_parity import check_parity_by_layer  # noqa: PLC0415
    from dlo_export.exporter.parity_check import check_parity  # noqa: PLC0415
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.exporter.sources.source import open_source  # noqa: PLC0415
    from dlo_export.exporter.tensorrt.plan import graph_options  # noqa: PLC0415
    from dlo_export.plugins.ort_registration import no_library  # noqa: PLC0415
    from dlo_export.runtimes.artefact.files import check_model_files  # noqa: PLC0415
    from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER  # noqa: PLC0415

    description = open_description(artefact)
    if by_layer and (provider or description.provider) != "cpu":
        asked = "--provider cuda is another" if provider else f"{artefact} was made for cuda"
        raise InputError(f"--by-layer compares on the CPU, {asked}", hint="add --provider cpu")
    if by_layer and device != "cpu":
        raise InputError(f"--by-layer compares on the CPU, --device {device} is another", hint="leave --device out")
    runs_it = BY_PROVIDER[provider or description.provider]
    runs_it.check_here()
    if description.plugin_operators and ort_plugin_library is None:
        raise no_library(description.plugin_operators)
    check_model_files(description, artefact)
    reporter = Reporter(verbose=verbose)
    with naming_allow_nonfinite():
        source = open_source(
            model,
            adapter,
            allow_nonfinite=allow_nonfinite,
            force_base=force_base,
            engines=bool(description.engines),
        )
        with contextlib.closing(source):
            for warning in source.warnings:
                reporter.warn(warning)
            report: ParityReport | LayerReport
            if by_layer:
                with reporter.count("parity") as progress:
                    report = check_parity_by_layer(source, artefact, description, ort_plugin_library, progress=progress)
            else:
                with reporter.stage("parity"):
                    graphs = map(graph_options, description.engines)
                    report = check_parity(
                        source, artefact, description, graphs, ort_plugin_library, provider=runs_it, device=device
                    )
    if as_json:
        print_json(report.to_json())
    else:
        typer.echo(report.summary())
    if report.verdict == "FAIL":
        raise typer.Exit(PARITY_FAILED)
    if report.verdict == "NOT RUN":
        # Nothing else was asked for: who goes by exit codes must not take it for proof.
        raise typer.Exit(MACHINE)
