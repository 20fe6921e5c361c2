"""(d) What is shipped: exported artefacts, their parity, perplexity and speed, side by side."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.papers.budget import Piece
from benchmarks.papers.expansion_loss import BASE
from benchmarks.papers.experiment import Experiment
from benchmarks.papers.run_names import SHIPPED

SPEED = "shipped-speed"


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
    return [*exported, timing]


# What needs ONNX Runtime is imported where it is used: everything else does without.


def _exported(experiment: Experiment, name: str) -> dict[str, Any]:
    from benchmarks.papers.artefacts import exported  # noqa: PLC0415 - see above

    return exported(experiment, name)


def _timed(experiment: Experiment) -> dict[str, Any]:
    from benchmarks.papers.artefacts import timed  # noqa: PLC0415 - see above

    return timed(experiment)
