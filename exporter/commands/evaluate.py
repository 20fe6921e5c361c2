"""`dlo evaluate`: perplexity of texts and accuracy on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlo_export.exporter.commands.numbers import MAX_COUNT, MAX_THREADS
from dlo_export.exporter.commands.shared_options import Device, ForceBase, OrtPluginLibrary, Provider, Verbose

if TYPE_CHECKING:
    from rich.table import Table

    from dlo_export.exporter.evaluate import ModelEvaluation
    from dlo_export.runtimes.evaluation.estimates import Estimate

NAME = "evaluate"

RunnerChoice = Literal["auto", "onnxruntime", "torch"]


def main(
    model: Annotated[str, typer.Argument(help="Artefact folder, checkpoint folder, .gguf file, or hub id.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Measure perplexity on this: a text, a .jsonl of texts, or a folder.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option(help="Measure accuracy on these requests, .jsonl or .jsonl.gz.")
    ] = None,
    runner: Annotated[RunnerChoice, typer.Option(help="ONNX Runtime for artefacts, PyTorch for checkpoints.")] = "auto",
    adapter: Annotated[Path | None, typer.Option(help="Adapter on a checkpoint.")] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Run every MLP of a checkpoint, whatever its routers say.")
    ] = False,
    active_rate: Annotated[
        bool, typer.Option("--active-rate", help="Show an artefact's active rates too; a checkpoint's always show.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="First windows of each text, first questions of each task.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Sequences at once; by default as many as pay.")
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Tokens of a window of text; 1024 or what the model takes."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Tokens from one window to the next; a window's length.")
    ] = None,
    device: Device = "cpu",
    provider: Provider = None,
    threads: Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="Of ONNX Runtime.")] = None,
    ort_plugin_library: OrtPluginLibrary = None,
    force_base: ForceBase = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure perplexity and accuracy, of an artefact as it ships or of a checkpoint, with standard errors."""
    from dlo_export.exporter.evaluate import EvaluationRequest, evaluate_model  # noqa: PLC0415 - keeps --help quick
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415

    request = EvaluationRequest(
        model=model,
        texts=tuple(text or ()),
        tasks=tuple(tasks or ()),
        runner=runner,
        adapter=adapter,
        dense=dense,
        active_rate=active_rate,
        device=device,
        provider=provider,
        threads=threads,
        sequence=sequence,
        stride=stride,
        batch=batch,
        limit=limit,
        force_base=force_base,
        ort_plugin_library=ort_plugin_library,
    )
    evaluation = evaluate_model(request, Reporter(verbose=verbose))
    if as_json:
        print_json(evaluation.to_json())
    else:
        _print_report(evaluation)


def _print_report(evaluation: ModelEvaluation) -> None:
    from rich.console import Console  # noqa: PLC0415

    result = evaluation.result
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width of its own
    if result.perplexities:
        console.print(_text_table(evaluation))
    if result.tasks:
        console.print(_task_table(evaluation))


def _text_table(evaluation: ModelEvaluation) -> Table:
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from dlo_export.exporter.messages import escaped  # noqa: PLC0415

    settings = evaluation.result.plan.settings
    table = Table(
        *("text", "perplexity", "nats per token", "bits per byte", "scored tokens", "active", "tokens/s"),
        caption=f"windows of {settings.window} tokens, stride {settings.step}; ± one standard error over documents or "
        "windows (w)",
    )
    for text, result in zip(evaluation.result.plan.texts, evaluation.result.perplexities, strict=True):
        table.add_row(
            escape(escaped(text.name)),
            _shown(result.perplexity, ".3f") + (" (w)" if result.error_over == "windows" else ""),
            _shown(result.nats_per_token, ".4f"),
            _shown(result.bits_per_byte, ".4f"),
            f"{result.scored_tokens:,}",
            _active(result.active_rate),
            f"{result.read_tokens / result.seconds:,.0f}",
        )
    return table


def _task_table(evaluation: ModelEvaluation) -> Table:
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from dlo_export.exporter.messages import escaped  # noqa: PLC0415

    table = Table(
        *("task", "accuracy", "per character", "per byte", "gold, bits/byte", "questions", "active", "tokens/s"),
        caption="± one standard error; left out: requests without context; cut: those longer than the model's context",
    )
    for encoded, result in zip(evaluation.result.plan.tasks, evaluation.result.tasks, strict=True):
        asides = {"left out": result.unconditional, "cut": result.truncated}
        table.add_row(
            escape(escaped(encoded.task.name)),
            _shown(result.accuracy, ".1%"),
            _shown(result.accuracy_per_character, ".1%"),
            _shown(result.accuracy_per_byte, ".1%"),
            _shown(result.gold_bits_per_byte, ".4f"),
            ", ".join([f"{result.questions:,}", *(f"{count:,} {what}" for what, count in asides.items() if count)]),
            _active(result.active_rate),
            f"{result.read_tokens / result.seconds:,.0f}",
        )
    return table


def _shown(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return ""
    error = estimate.standard_error
    return f"{estimate.value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def _active(rates: dict[int, float]) -> str:
    """Mean over the routed layers."""
    return f"{sum(rates.values()) / len(rates):.1%}" if rates else ""
