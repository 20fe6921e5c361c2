"""`dlo bench`: prefill and decode of several artefacts, compared in one run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from dlo_export.exporter.commands.numbers import MAX_THREADS
from dlo_export.exporter.commands.shared_options import OrtPluginLibrary, Provider, Verbose

NAME = "bench"
SEQUENCE = 512


def main(
    artefacts: Annotated[list[Path], typer.Argument(help="Folders that dlo-export wrote; ratios are to the first.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the prefill.")] = 128,
    decode_tokens: Annotated[int, typer.Option(min=1, help="Steps of one token behind it.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating blocks of each artefact.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    perplexity_tokens: Annotated[
        int, typer.Option("--perplexity", min=0, help="Measure perplexity on so many held-out tokens too; 0: do not.")
    ] = 0,
    text: Annotated[
        Path | None, typer.Option(help="File or folder of .txt; Python's own documentation by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=MAX_THREADS, help="Of ONNX Runtime.")] = None,
    provider: Provider = None,
    ort_plugin_library: OrtPluginLibrary = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Of one artefact: time every lowering of its graph, and rewrite it to the fastest."
        ),
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="First compare all files with their hashes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of the table.")] = False,
    verbose: Verbose = False,
) -> None:
    """Time prefill and decode of artefacts in alternating blocks, with their active rates on real text."""
    from dlo_export.exporter.artefact_check import open_description  # noqa: PLC0415 - keeps `dlo --help` quick
    from dlo_export.exporter.artefact_runner import held_tokens, open_artefact  # noqa: PLC0415
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.progress import Reporter  # noqa: PLC0415
    from dlo_export.runtimes.artefact.description import load_description, mean_active_rates  # noqa: PLC0415
    from dlo_export.runtimes.bench import Subject, Workload, compare_speed, ratio  # noqa: PLC0415
    from dlo_export.runtimes.evaluation.active_rate import measure_active_rate  # noqa: PLC0415
    from dlo_export.runtimes.evaluation.encoding import Window  # noqa: PLC0415
    from dlo_export.runtimes.evaluation.perplexity import measure_perplexity  # noqa: PLC0415
    from dlo_export.runtimes.evaluation.scorer import RunnerScorer, Segment  # noqa: PLC0415

    reporter = Reporter(verbose=verbose)
    if tune:
        if len(artefacts) > 1 or perplexity_tokens:
            raise typer.BadParameter("--tune takes one artefact, and no --perplexity")
        workload = Workload(batch, prompt_tokens, decode_tokens, rounds)
        _tune(artefacts[0], text, workload, reporter, threads, provider, ort_plugin_library, as_json=as_json)
        return
    descriptions = [open_description(folder) if verify else load_description(folder) for folder in artefacts]
    for folder, description in zip(artefacts, descriptions, strict=True):
        _check_fits(folder, description, prompt_tokens, decode_tokens, reporter, perplexity=bool(perplexity_tokens))
    workload = Workload(batch, prompt_tokens, decode_tokens, rounds)
    needed = max(perplexity_tokens, batch * (prompt_tokens + decode_tokens))
    sequences = [held_out_sequences(folder, text, -(-needed // SEQUENCE) * SEQUENCE) for folder in artefacts]
    with ExitStack() as stack, reporter.stage("timing"):
        subjects = [
            Subject(
                # As released: what its routers decide is measured apart, below.
                stack.enter_context(
                    open_artefact(
                        folder,
                        scores=False,
                        threads=threads,
                        allow_spinning=False,
                        plugin_library=ort_plugin_library,
                        provider=provider,
                    )
                ),
                ids.reshape(-1).tolist(),
            )
            for folder, ids in zip(artefacts, sequences, strict=True)
        ]
        timings = compare_speed(subjects, workload)
    rows: list[dict[str, Any]] = []
    for folder, description, ids, timing in zip(artefacts, descriptions, sequences, timings, strict=True):
        row: dict[str, Any] = {"artefact": str(folder), **timing.summary()}
        row["prefill_ratio"] = ratio(timing.prefill, timings[0].prefill)
        row["decode_ratio"] = ratio(timing.decode, timings[0].decode)
        opened = open_artefact(folder, threads=threads, plugin_library=ort_plugin_library, provider=provider)
        with opened as runner, reporter.stage("perplexity" if perplexity_tokens else "active rate"):
            # Of what fits the cache; a window's last token is not fed.
            length = min(SEQUENCE, (held_tokens(description) or SEQUENCE) + 1)
            count = max(SEQUENCE, perplexity_tokens) // length
            texts = ids.reshape(-1)[: count * length].reshape(count, length)
            if perplexity_tokens:
                measured = measure_perplexity(RunnerScorer(runner), [Window(Segment(each, 1), 0) for each in texts])
                row["perplexity"], rates = measured.perplexity.value, measured.active_rate
            else:
                row["perplexity"], rates = None, measure_active_rate(runner, texts[:, :-1])
        row["active_rate"] = mean_active_rates(description, rates)
        rows.append(row)
    if as_json:
        print_json({"workload": vars(workload), "artefacts": rows}, indent=None)
    else:
        _print_table(rows, workload)


def _check_fits(
    folder: Path, description: Any, prompt_tokens: int, decode_tokens: int, reporter: Any, *, perplexity: bool
) -> None:
    """Refuses what an artefact cannot run, before anything is timed; tells of what it was not made for."""
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415
    from dlo_export.checkpoints.generation_config import GenerationConfig  # noqa: PLC0415
    from dlo_export.exporter.artefact_runner import held_tokens, require_all_logits  # noqa: PLC0415

    tokens = prompt_tokens + decode_tokens
    context, slots = GenerationConfig.from_folder(folder).context_length, held_tokens(description)
    if context is not None and tokens > context:
        reporter.warn(f"{folder}: {prompt_tokens} tokens and {decode_tokens} steps go beyond its context of {context}")
    if slots is not None and tokens > slots:
        raise InputError(
            f"{folder}: {prompt_tokens} tokens and {decode_tokens} steps, its static cache holds {slots} tokens",
            hint=f"give --prompt-tokens and --decode-tokens that fit, or export with --static-cache {tokens} or more",
        )
    if perplexity:
        require_all_logits(folder, description, "leave --perplexity out, or export without --last-logits")


def _tune(
    folder: Path,
    text: Path | None,
    workload: Any,
    reporter: Any,
    threads: int | None,
    provider: Any,
    plugin_library: Path | None,
    *,
    as_json: bool,
) -> None:
    from dlo_export.exporter.json_output import print_json  # noqa: PLC0415
    from dlo_export.exporter.tune import tunable, tune  # noqa: PLC0415
    from dlo_export.runtimes.bench import ratio  # noqa: PLC0415

    folder = folder.resolve()  # a link goes on leading to the artefact, which is replaced where it lies
    description = tunable(folder, provider, plugin_library)
    _check_fits(folder, description, workload.prompt_tokens, workload.decode_tokens, reporter, perplexity=False)
    needed = workload.batch * (workload.prompt_tokens + workload.decode_tokens)
    ids = held_out_sequences(folder, text, -(-needed // SEQUENCE) * SEQUENCE).reshape(-1).tolist()
    tuned = tune(folder, description, ids, workload, reporter, threads=threads, plugin_library=plugin_library)
    base = tuned.timings[tuned.before]
    rows = [
        {
            "lowering": name,
            **timing.summary(),
            "prefill_ratio": ratio(timing.prefill, base.prefill),
            "decode_ratio": ratio(timing.decode, base.decode),
            "workload_ratio": tuned.totals[name],
            "logits_difference": tuned.differences[name],
        }
        for name, timing in tuned.timings.items()
    ]
    if as_json:
        found = {"workload": vars(workload), "before": tuned.before, "after": tuned.after, "lowerings": rows}
        print_json({"artefact": str(folder), **found}, indent=None)
        return
    for row in rows:
        shares = (
            "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**row[f"{each}_ratio"])
            for each in ("prefill", "decode", "workload")
        )
        typer.echo("{:8} prefill {}  decode {}  both {}".format(row["lowering"], *shares))
    kept = f"stays {tuned.before}" if tuned.after == tuned.before else f"was {tuned.before}, is {tuned.after} now"
    typer.echo(f"{folder}: lowering {kept}")


def held_out_sequences(folder: Path, text: Path | None, tokens: int) -> Any:
    """Tokens of documents that calibration leaves out, int64 [sequences, 512]."""
    from dlo_export.checkpoints.tokenization.encoder import load_encoder  # noqa: PLC0415
    from dlo_export.modeling.calibration.text import evaluation_sequences, read_documents  # noqa: PLC0415

    origin = "Python's documentation" if text is None else str(text)
    drawn = evaluation_sequences(
        read_documents(text), load_encoder(folder), max(tokens, SEQUENCE), origin=origin, sequence_length=SEQUENCE
    )
    return drawn.numpy()


def _labels(artefacts: list[Path]) -> list[str]:
    """What a table calls them: names of folders, or as they were given where two have one name."""
    names = [folder.name or folder.resolve().name for folder in artefacts]
    return names if len(set(names)) == len(names) else [str(folder) for folder in artefacts]


def _print_table(rows: list[dict[str, Any]], workload: Any) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from dlo_export.exporter.messages import escaped  # noqa: PLC0415

    table = Table(
        "artefact",
        f"prefill of {workload.prompt_tokens}, ms",
        "decode, ms/token",
        "active, original",
        "active, injected",
        "perplexity",
        caption="medians; in brackets the ratio to the first, median (p10 to p90) over alternating blocks",
    )
    labels = _labels([Path(row["artefact"]) for row in rows])
    for label, row in zip(labels, rows, strict=True):
        times = [
            f"{row[f'{phase}_seconds']['median'] * 1e3:.1f}  "
            + "[{median:.2f} ({p10:.2f} to {p90:.2f})]".format(**row[f"{phase}_ratio"])
            for phase in ("prefill", "decode")
        ]
        rates = [row["active_rate"][kind] for kind in ("original", "injected")]
        table.add_row(
            escape(escaped(label)),
            *(escape(time) for time in times),
            *("" if rate is None else f"{rate:.1%}" for rate in rates),
            "" if row["perplexity"] is None else f"{row['perplexity']:.2f}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width of its own
    console.print(table)
