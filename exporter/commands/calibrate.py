"""`dlo calibrate`: fit routers to real text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlo_export.exporter.commands.numbers import finite
from dlo_export.exporter.commands.shared_options import Force, ForceBase, Routing

if TYPE_CHECKING:
    from dlo_export.exporter.calibrate import CalibrationResult

NAME = "calibrate"


class Labels(StrEnum):
    """Choices of --labels."""

    COS_GLOBAL = "cos-global"
    COS = "cos"


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, .gguf file, or hub id in the local cache.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Routed checkpoint (or adapter) to make.")],
    target: Annotated[
        float, typer.Option(callback=finite, help="Share of tokens that do not skip, over the original layers.")
    ] = 0.9,
    routing: Routing = None,
    labels: Annotated[
        Labels, typer.Option(help="Share the skips out over all layers by similarity, or evenly.")
    ] = Labels.COS_GLOBAL,
    layers: Annotated[str | None, typer.Option(help="Layers to route, 3,5,7; all by default.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="File or folder of .txt; Python's own documentation by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="To fit on.")] = 16_384,
    evaluation_tokens: Annotated[int, typer.Option(min=512, help="To measure on, from other documents.")] = 8_192,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of documents to fit on.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter on the model; the output is then an adapter too.")
    ] = None,
    as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write the routers alone, as an adapter.")] = False,
    force: Force = False,
    force_base: ForceBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Time of each stage.")] = False,
) -> None:
    """Fit routers by similarity, the model frozen, and report what they skip and cost on held-out text."""
    from dlo_export.exporter.calibrate import CalibrationRequest, calibrate  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.modeling.calibration.router_calibration import CalibrationSettings  # noqa: PLC0415

    try:
        chosen = tuple(int(layer) for layer in layers.split(",")) if layers is not None else None
    except ValueError as err:
        raise typer.BadParameter(f"{layers!r} is not a list of layers such as 3,5,7", param_hint="'--layers'") from err
    request = CalibrationRequest(
        model=model,
        output=output,
        adapter=adapter,
        as_adapter=as_adapter,
        settings=CalibrationSettings(target_active=target, labels=labels.value, layers=chosen),
        text=text,
        tokens=tokens,
        evaluation_tokens=evaluation_tokens,
        seed=seed,
        force=force,
        force_base=force_base,
        routing=routing,
    )
    result = calibrate(request, Reporter(verbose=verbose))
    if as_json:
        print_json(result.to_json())
    else:
        _print_report(result, output)


def _print_report(result: CalibrationResult, output: Path) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table("layer", "kind", "active, labels", "active, held out", "agreement")
    for layer, rate in result.routed.active_rates.items():
        fitted = layer in result.fitted.label_rates
        kind = "injected" if layer in result.injected else "original"
        table.add_row(
            str(layer),
            kind if fitted else f"{kind}, identity",
            f"{result.fitted.label_rates[layer]:.1%}" if fitted else "",
            f"{rate:.1%}",
            f"{result.fitted.agreement[layer]:.1%}" if fitted else "",
        )
    Console().print(table)
    rates = {
        kind: result.active_rate(injected=injected) for kind, injected in (("original", False), ("injected", True))
    }
    shown = ", ".join(f"{rate:.1%} over the {kind} layers" for kind, rate in rates.items() if rate is not None)
    typer.echo(
        f"{output}: active {shown}; perplexity on {result.routed.tokens} held-out tokens "
        f"{result.dense.perplexity:.2f} → {result.routed.perplexity:.2f}"
    )
