"""`dlo-export MODEL`: a model in, an artefact out."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

NAME = "export"


class Dtype(StrEnum):
    """Choices of --dtype."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class LoweringOption(StrEnum):
    """Choices of --lowering."""

    AUTO = "auto"
    MASKED = "masked"
    COMPACT = "compact"
    IF = "if"


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, .gguf or .onnx file, or hub id in the local cache.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Artefact folder; MODEL's name with -dlo unless given.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="DloAdapter: injected layers and routers.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights, KV cache and logits; auto is fp32 on a CPU.")] = Dtype.AUTO,
    lowering: Annotated[
        LoweringOption, typer.Option(help="What routed layers become; auto chooses by what was measured.")
    ] = LoweringOption.AUTO,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Do not compare with PyTorch.")] = False,
    no_weights: Annotated[bool, typer.Option("--no-weights", help="Leave model.onnx.data out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print dlo_artifact.json to stdout.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Time of each stage; tracebacks of bugs.")] = False,
) -> None:
    """Export a Llama, plain, deepened or routed, to an ONNX artefact that is proven equal to PyTorch."""
    from exporter.export import ExportRequest, export_model  # noqa: PLC0415 - keeps `dlo --help` quick
    from exporter.progress import Reporter  # noqa: PLC0415

    reporter = Reporter(verbose=verbose)
    request = ExportRequest(
        model=model,
        output=output or Path(f"{Path(model).name.removesuffix('.gguf').removesuffix('.onnx')}-dlo"),
        adapter=adapter,
        dtype=dtype.value,
        lowering=lowering.value,
        parity=not no_parity,
        weights=not no_weights,
        force=force,
    )
    result = export_model(request, reporter)
    if result.description["parity"]["verdict"] == "AMBIGUOUS":
        typer.echo("warning: parity is ambiguous: near-ties of routers fell the other way, see parity.json", err=True)
    if as_json:
        typer.echo(json.dumps(result.description, indent=2))
        return
    if result.parity_summary:
        typer.echo(result.parity_summary)
    layers = result.description["layers"]
    counts = {kind: sum(layer[kind] for layer in layers) for kind in ("injected", "routed", "identity")}
    typer.echo(
        f"{result.folder}: {len(layers)} layers ({counts['injected']} injected, {counts['routed']} routed, "
        f"{counts['identity']} identity), lowering {result.description['lowering']}, {result.bytes / 2**20:.0f} MB, "
        f"parity {result.description['parity']['verdict']}"
    )
