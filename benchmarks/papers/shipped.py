"""(d) What is shipped: exported artefacts, their parity, perplexity and speed, side by side."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from benchmarks.papers.budget import Piece
from benchmarks.papers.expansion_loss import BASE, pass_seconds
from benchmarks.papers.experiment import Experiment
from dlo_export.checkpoints.errors import InputError

SPEED, TASKS = "shipped-speed", "task-"
SHIPPED = ("train-original", "train-deepened", "train-dlo")
"""Runs whose models are exported: the original and the dense deepened model beside the routed one."""
DENSE, ROUTED = SHIPPED[1:]


def shipped_pieces(experiment: Experiment) -> list[Piece]:
    """Exports each model with parity, measures it, then times all of them against each other."""

    def export_seconds() -> float:
        parameters: int = experiment.results[BASE]["parameters"]
        return 4 + parameters / 4e6  # parity runs PyTorch and ONNX Runtime over several cases

    exported = [
        Piece(f"shipped-{name}", export_seconds, functools.partial(_exported, experiment, name), (name,))
        for name in SHIPPED
    ]
    timing = Piece(
        SPEED,
        lambda: export_seconds() + 4 * experiment.form.rounds * export_seconds() / 20,
        functools.partial(_timed, experiment),
        tuple(piece.name for piece in exported),
    )
    return [*exported, timing, *_task_pieces(experiment)]


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


def _task_pieces(experiment: Experiment) -> list[Piece]:
    """A piece for each model and task; none where no tasks were given."""
    if experiment.tasks is None:
        return []

    def seconds() -> float:
        read = 300.0 * experiment.form.questions  # tokens; four continuations of some seventy
        held_out = len(experiment.windows) * experiment.form.held_out_tokens
        return 2 * read * pass_seconds(experiment) / held_out

    return [
        Piece(
            f"{TASKS}{name}-{file.name.split('.')[0]}",
            seconds,
            functools.partial(_accuracy, experiment, name, file),
            (f"shipped-{name}",),
        )
        for file in task_files(experiment.tasks)
        for name in SHIPPED
    ]


# What needs ONNX Runtime is imported where it is used: everything else does without.


def _exported(experiment: Experiment, name: str) -> dict[str, Any]:
    from benchmarks.papers.artefacts import exported  # noqa: PLC0415 - see above

    return exported(experiment, name)


def _timed(experiment: Experiment) -> dict[str, Any]:
    from benchmarks.papers.artefacts import timed  # noqa: PLC0415 - see above

    return timed(experiment)


def _accuracy(experiment: Experiment, name: str, file: Path) -> dict[str, Any]:
    from benchmarks.papers.artefacts import accuracy  # noqa: PLC0415 - see above

    return accuracy(experiment, name, file)
