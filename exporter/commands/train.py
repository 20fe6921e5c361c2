"""`dlo train`: fine-tune a model with its routers in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlo_export.exporter.commands.numbers import finite
from dlo_export.exporter.commands.shared_options import Device, Force, ForceBase, Routing, Verbose
from dlo_export.modeling.training.settings import Dtype, Labels, LongChats, Mode, Selection

if TYPE_CHECKING:
    from dlo_export.exporter.train import TrainRequest
    from dlo_export.modeling.training.run import TrainingResult

NAME = "train"


Routers = Literal["keep", "add", "none"]


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, .gguf file, or hub id in the local cache.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint to make; the run lives in OUTPUT.run.")],
    data: Annotated[Path, typer.Option(help=".jsonl of chats or texts, .txt, or a folder of them.")],
    held_out_data: Annotated[
        Path | None, typer.Option("--held-out", help="The same to measure on; else a share of the documents.")
    ] = None,
    other_text: Annotated[
        list[Path] | None,
        typer.Option("--other-text", help="The same to measure the trained model on, each alone; may be repeated."),
    ] = None,
    held_out_share: Annotated[float, typer.Option(callback=finite, help="That share.")] = 0.02,
    adapter: Annotated[Path | None, typer.Option(help="Adapter on the model.")] = None,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Write routers and LoRA's matrices alone, as an adapter.")
    ] = False,
    routers: Annotated[
        Routers, typer.Option(help="Those the model has, an all-zero one for each layer without, or none at all.")
    ] = "keep",
    routing: Routing = None,
    mode: Annotated[Mode, typer.Option(help="What learns; routers always do.")] = "full",
    target: Annotated[
        float, typer.Option(callback=finite, help="Share of tokens that are not to skip, over the routed layers.")
    ] = 0.9,
    anneal_steps: Annotated[int, typer.Option(help="Steps over which the target falls from 1.")] = 1000,
    labels: Annotated[Labels, typer.Option(help="How tokens are labelled for the routers.")] = "cos-global",
    selection: Annotated[
        Selection, typer.Option(help="Which tokens do not skip in training; inference goes by the threshold.")
    ] = "top-k",
    soft_steps: Annotated[int, typer.Option(help="Steps over which --selection annealed hardens its gates.")] = 100,
    language_weight: Annotated[float, typer.Option(callback=finite, help="Of the language loss.")] = 1.0,
    distill_weight: Annotated[
        float, typer.Option(callback=finite, help="Of the divergence from the model as it was before, unrouted.")
    ] = 0.0,
    skip_weight: Annotated[float, typer.Option(callback=finite, help="Of the routers' labels in the loss.")] = 1.0,
    rate_weight: Annotated[
        float, typer.Option(callback=finite, help="Of the distance of inference's active rate from the target.")
    ] = 10.0,
    exact_rate: Annotated[
        bool,
        typer.Option(
            "--exact-rate/--trained-rate", help="Shift thresholds to the target on held-out text, or leave them."
        ),
    ] = True,
    epochs: Annotated[float, typer.Option(callback=finite, help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of --epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once, per process.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches of one step, per process.")] = 1,
    sequence: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence, which short documents share; 1024 or what the model takes."),
    ] = None,
    long_chats: Annotated[LongChats, typer.Option(help="Of chats longer than a sequence.")] = "error",
    learning_rate: Annotated[float, typer.Option(callback=finite, help="Of all but the routers.")] = 2e-5,
    router_learning_rate: Annotated[float, typer.Option(callback=finite, help="Of the routers.")] = 1e-3,
    relative_router_rate: Annotated[
        bool,
        typer.Option("--relative-router-rate", help="Of each router, as a share of its size: for fitted ones, 0.02."),
    ] = False,
    layer_wise: Annotated[
        bool, typer.Option("--layer-wise/--uniform", help="Learning rates by the layers' capacities, or one.")
    ] = True,
    warmup: Annotated[float, typer.Option(callback=finite, help="Share of the steps learning rates rise in.")] = 0.03,
    max_grad_norm: Annotated[float, typer.Option(callback=finite, help="To which gradients are clipped.")] = 1.0,
    dtype: Annotated[Dtype, typer.Option(help="bf16 by autocast; weights and routers stay fp32.")] = "fp32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="Compile the layers: pays for long runs, needs a compiler.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Of --mode lora.")] = 16,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 200,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints of the run.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the data's order and what is held out.")] = 0,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUTPUT.run.")] = False,
    force: Force = False,
    force_base: ForceBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model with its routers in place (DLO), resumable, and write the trained checkpoint."""
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.exporter.train import TrainRequest, report_json, train  # noqa: PLC0415
    from dlo_export.exporter.training_progress import TrainingProgress  # noqa: PLC0415
    from dlo_export.modeling.training.settings import TrainingSettings  # noqa: PLC0415

    settings = TrainingSettings(
        mode=mode,
        target=target,
        anneal_steps=anneal_steps,
        labels=labels,
        selection=selection,
        soft_steps=soft_steps,
        language_weight=language_weight,
        distill_weight=distill_weight,
        skip_weight=skip_weight,
        rate_weight=rate_weight,
        exact_rate=exact_rate,
        epochs=epochs,
        max_steps=max_steps,
        batch=batch,
        accumulate=accumulate,
        long_chats=long_chats,
        learning_rate=learning_rate,
        router_learning_rate=router_learning_rate,
        relative_router_rate=relative_router_rate,
        layer_wise=layer_wise,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_layers,
        lora_rank=lora_rank,
        held_out=held_out_share,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
        device=device,
    )
    request = TrainRequest(
        model=model,
        output=output,
        data=data,
        held_out=held_out_data,
        other_text=tuple(other_text or ()),
        adapter=adapter,
        as_adapter=as_adapter,
        routers=routers,
        routing=routing,
        settings=settings,
        sequence=sequence,
        resume=resume,
        force=force,
        force_base=force_base,
    )
    reporter = Reporter(verbose=verbose)
    with TrainingProgress(reporter.console) as progress:
        result = train(request, reporter, progress.show)
    if result.stopped or not result.is_main:
        return
    if as_json:
        print_json(report_json(result))
    else:
        _print_report(result, request)


def _print_report(result: TrainingResult, request: TrainRequest) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    assert result.held_out is not None
    if result.held_out.active:
        table = Table("layer", "active, held out")
        for layer, rate in result.held_out.active.items():
            table.add_row(str(layer), f"{rate:.1%}")
        Console().print(table)
    mean, target = result.held_out.active_rate, request.settings.target
    active = "" if mean is None else f", active {mean:.1%} over the routed layers (target {target:.0%})"
    if result.rate_control is not None and result.rate_control.after != result.rate_control.before:
        active += f", {result.rate_control.before:.1%} before its thresholds were shifted"
    for name, measured in result.others.items():
        its_rate = "" if measured.active_rate is None else f", active {measured.active_rate:.1%}"
        typer.echo(f"{name}: perplexity {measured.perplexity:.2f}{its_rate}")
    typer.echo(f"{request.output}: {result.step} steps, held-out perplexity {result.held_out.perplexity:.2f}{active}")
