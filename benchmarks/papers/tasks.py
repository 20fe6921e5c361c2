"""(d) Log-likelihood tasks: of the artefacts on a CPU, and of the checkpoints they are made from on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.papers.budget import Piece
from benchmarks.papers.expansion_loss import pass_seconds
from benchmarks.papers.experiment import Experiment
from benchmarks.papers.run_names import SHIPPED
from benchmarks.papers.subjects import saved_model
from benchmarks.papers.training import TrainingRun
from dlo_export.checkpoints.errors import InputError
from dlo_export.runtimes.evaluation.evaluate import EvaluationSettings, evaluate, plan_evaluation
from dlo_export.runtimes.evaluation.requests import read_task
from dlo_export.runtimes.evaluation.scorer import TokenScorer
from dlo_export.runtimes.generation.tokenizer import Tokenizer
from dlo_export.runtimes.torch.scorer import TorchScorer

PREFIX = "task-"


def task_files(folder: Path) -> list[Path]:
    """Requests of log-likelihood tasks, as `dlo evaluate` reads them.

    Raises:
        InputError: There are none.
    """
    files = sorted(file for kind in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(kind))
    if not files:
        raise InputError(
            f"{folder}: holds no .jsonl and no .jsonl.gz", hint="`dlo evaluate --help` says what they hold"
        )
    return files


def task_pieces(experiment: Experiment, runs: Sequence[TrainingRun], *, of_artefacts: bool) -> list[Piece]:
    """A piece for each model and task; none where no tasks were given.

    Args:
        experiment: Where.
        runs: Those of `SHIPPED` among them are measured.
        of_artefacts: Measure what was exported of them; else PyTorch runs them, on the experiment's device.
    """
    if experiment.tasks is None:
        return []

    def seconds() -> float:
        if known := [float(values["seconds"]) for values in experiment.results.found(PREFIX).values()]:
            return 2.0 * max(known)
        read = 300.0 * experiment.form.questions  # tokens; four continuations of some seventy
        held_out = len(experiment.windows) * experiment.form.held_out_tokens
        # A GPU takes many more continuations at once than windows.
        return (2.0 if experiment.device == "cpu" else 0.3) * read * pass_seconds(experiment) / held_out

    return [
        Piece(
            f"{PREFIX}{name}-{file.name.split('.')[0]}",
            seconds,
            functools.partial(_of_artefact if of_artefacts else _of_checkpoint, experiment, name, file),
            (f"shipped-{name}" if of_artefacts else name,),
        )
        for name in SHIPPED
        if name in [run.name for run in runs]
        for file in task_files(experiment.tasks)
    ]


def _of_checkpoint(experiment: Experiment, name: str, file: Path) -> dict[str, Any]:
    # What is exported computes the same: that is what parity says of it.
    folder = experiment.results.model(name)
    return _measured(experiment, name, file, folder, TorchScorer(saved_model(folder), device=experiment.device))


def _of_artefact(experiment: Experiment, name: str, file: Path) -> dict[str, Any]:
    from benchmarks.papers.artefacts import artefact_scorer  # noqa: PLC0415 - needs ONNX Runtime, which not all do

    folder, opened = artefact_scorer(experiment, name)
    with opened as scorer:
        return _measured(experiment, name, file, folder, scorer)


def _measured(experiment: Experiment, name: str, file: Path, folder: Path, scorer: TokenScorer) -> dict[str, Any]:
    settings = EvaluationSettings(limit=experiment.form.questions)
    plan = plan_evaluation(Tokenizer(folder), [], [read_task(file)], settings)
    (result,) = evaluate(scorer, plan).tasks
    return {
        "model": name,
        "task": plan.tasks[0].task.name,
        "measured": scorer.name,
        "questions": result.questions,
        "accuracy": dataclasses.asdict(result.accuracy),
        "gold_bits_per_byte": dataclasses.asdict(result.gold_bits_per_byte),
    }
