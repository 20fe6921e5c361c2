"""`dlo calibrate`: fit routers to real text, or move the active rate of those there are."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlo_export.exporter.commands.numbers import finite
from dlo_export.exporter.commands.shared_options import Device, Force, ForceBase, Routing, Verbose

if TYPE_CHECKING:
    from dlo_export.exporter.calibrate import CalibrationResult

NAME = "calibrate"


class Labels(StrEnum):
    """Choices of --labels."""

    COS_GLOBAL = "cos-global"
    COS = "cos"


class Objective(StrEnum):
    """Choices of --objective."""

    SIMILARITY = "similarity"
    DISTILL = "distill"


# What says how routers are fitted says nothing where none are.
_OF_THE_FIT = ("target", "labels", "layers", "objective", "steps", "router_learning_rate")


def main(
    context: typer.Context,
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
    objective: Annotated[
        Objective,
        typer.Option(help="Fit to the similarity of the stream alone, or train the routers on to keep the output."),
    ] = Objective.SIMILARITY,
    steps: Annotated[int, typer.Option(min=1, help="Of --objective distill, 2,048 tokens each.")] = 24,
    router_learning_rate: Annotated[
        float, typer.Option(callback=finite, help="Of distill: the share of its size a router's weight moves by.")
    ] = 0.05,
    retarget: Annotated[
        float | None,
        typer.Option(callback=finite, help="Fit nothing: move the rate of the routers there are, by their thresholds."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="File or folder of .txt; Python's own documentation by default.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=512, help="To fit on; 16,384 by default, 49,152 to distill.", show_default=False)
    ] = None,
    evaluation_tokens: Annotated[int, typer.Option(min=512, help="To measure on, from other documents.")] = 8_192,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of documents to fit on.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter on the model; the output is then an adapter too.")
    ] = None,
    as_adapter: Annotated[bool, typer.Option("--as-adapter", help="Write the routers alone, as an adapter.")] = False,
    device: Device = "cpu",
    force: Force = False,
    force_base: ForceBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Fit routers, the model frozen, or move the rate of its routers; report what they skip and cost elsewhere."""
    from dlo_export.exporter.calibrate import CalibrationRequest, calibrate  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.modeling.calibration.router_calibration import CalibrationSettings  # noqa: PLC0415
    from dlo_export.modeling.training.router_distillation import DistillationSettings  # noqa: PLC0415

    if retarget is not None:
        given = [name for name in _OF_THE_FIT if _is_given(context, name)]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise typer.BadParameter(f"fits nothing, so leave out {options}", param_hint="'--retarget'")
    if router_learning_rate <= 0:
        raise typer.BadParameter(f"{router_learning_rate} is not more than 0", param_hint="'--router-learning-rate'")
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
        device=device,
        force=force,
        force_base=force_base,
        routing=routing,
        distillation=DistillationSettings(steps=steps, learning_rate=router_learning_rate, seed=seed)
        if objective is Objective.DISTILL
        else None,
        retarget=retarget,
    )
    result = calibrate(request, Reporter(verbose=verbose))
    if as_json:
        print_json(result.to_json())
    else:
        _print_report(result, output)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _print_report(result: CalibrationResult, output: Path) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    fitted_any = bool(result.fitted.label_rates)
    table = Table("layer", "kind", *(("active, labels", "agreement") if fitted_any else ()), "active, held out")
    for layer, rate in result.routed.active_rates.items():
        fitted = layer in result.fitted.label_rates
        kind = "injected" if layer in result.injected else "original"
        labels = [f"{result.fitted.label_rates[layer]:.1%}", f"{result.fitted.agreement[layer]:.1%}"] if fitted else []
        table.add_row(
            str(layer),
            f"{kind}, identity" if layer in result.fitted.identity_layers else kind,
            *((labels or ["", ""]) if fitted_any else ()),
            f"{rate:.1%}",
        )
    Console().print(table)
    rates = {
        kind: result.active_rate(injected=injected) for kind, injected in (("original", False), ("injected", True))
    }
    shown = ", ".join(f"{rate:.1%} over the {kind} layers" for kind, rate in rates.items() if rate is not None)
    if result.rate is not None:
        shown += f" (asked for {result.rate.target:.1%}, {result.rate.before:.1%} before thresholds were shifted)"
    typer.echo(
        f"{output}: active {shown}; perplexity on {result.routed.tokens} held-out tokens "
        f"{result.dense.perplexity:.2f} → {result.routed.perplexity:.2f}"
    )
