"""Compares a model with its reference a layer at a time: neither is ever in memory as a whole.

Every part (the embedding, each layer, the head) runs all steps of all cases before the next one is opened. What goes on
to the next part is the residual stream alone, so a cache lives as long as its layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.runtimes.parity.cases import Case, Feed
from dlo_export.runtimes.parity.layer_report import LayerReport, PartResult
from dlo_export.runtimes.parity.statistics import (
    NO_SCORES,
    Flip,
    ScoreStatistics,
    flips,
    relative_errors,
    score_statistics,
)
from dlo_export.runtimes.parity.tolerances import TOLERANCES
from dlo_export.runtimes.runner import BoolArray, FloatArray, decisions


class PartOutput(NamedTuple):
    """What a part gives out in a step.

    Attributes:
        values: The residual stream behind it, float32 [batch, sequence, hidden]; of the head, logits [batch, sequence,
            vocab], or those of the last token.
        scores: Of its router, float32 [batch, sequence]; None where it has none.
    """

    values: FloatArray
    scores: FloatArray | None


class Part(Protocol):
    """A part of a model, open."""

    def reset(self, batch: int) -> None:
        """Forgets the cached tokens, for a batch of so many sequences."""

    def step(self, stream: FloatArray | None, feed: Feed, active: BoolArray | None) -> PartOutput:
        """Runs a step behind the cached tokens: the stream in front of it, the tokens, decisions of the router's."""


OpenPart = Callable[[int], AbstractContextManager[Part]]
"""By number: 0 is the embedding, then come the layers, then the head."""


def compare_by_layer(
    open_reference: OpenPart,
    open_candidate: OpenPart,
    cases: Sequence[Case],
    *,
    num_layers: int,
    thresholds: Mapping[int, float],
    dtype: str,
    names: tuple[str, str],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> LayerReport:
    """Runs all cases through part after part of both.

    The candidate is fed the reference's decisions, so that a near-tie does not hide what else differs, and runs each
    part twice: behind its own stream, and behind the reference's.

    Args:
        open_reference: Opens what is right.
        open_candidate: Opens what is compared.
        cases: What to feed.
        num_layers: Of both.
        thresholds: By routed layer, the score that an active token's exceeds.
        dtype: Of the candidate, a key of TOLERANCES.
        names: Of the two, for the report.
        progress: Told after every part.
    """
    total = num_layers + 2
    wanted: list[list[FloatArray | None]] = [[None] * len(case.feeds) for case in cases]
    found = [list(streams) for streams in wanted]
    results: list[PartResult] = []
    for part in range(total):
        layer = part - 1 if part - 1 in thresholds else None
        threshold = ONE_HALF if layer is None else thresholds[layer]
        # One behind the other: the weights of one alone are in memory.
        right = _reference_runs(functools.partial(open_reference, part), cases, wanted, layer, threshold)
        runs = _candidate_runs(functools.partial(open_candidate, part), cases, right, wanted, found)
        results.append(_result(_name(part, num_layers), runs, cases, layer, threshold))
        wanted = [[output.values for output in run.reference] for run in runs]
        found = [[output.values for output in run.own] for run in runs]
        progress(part + 1, total)
        if not math.isfinite(results[-1].error):
            break  # nothing behind it is a number
    return LayerReport(*names, dtype, TOLERANCES[dtype], tuple(results))


class _CaseRun(NamedTuple):
    """Outputs of a case's steps: the reference's, the candidate's behind its own stream, and behind the reference's."""

    reference: list[PartOutput]
    own: list[PartOutput]
    alone: list[PartOutput]


class _ReferenceRun(NamedTuple):
    """Outputs of a case's steps, and the decisions they were computed under, where the part has a router."""

    outputs: list[PartOutput]
    active: list[BoolArray | None]


_Streams = Sequence[list[FloatArray | None]]
"""In front of a part, by case and step; None in front of the first part."""


def _reference_runs(
    open_part: Callable[[], AbstractContextManager[Part]],
    cases: Sequence[Case],
    streams: _Streams,
    layer: int | None,
    threshold: float,
) -> list[_ReferenceRun]:
    with open_part() as reference:
        return [_reference_run(reference, *each, layer, threshold) for each in zip(cases, streams, strict=True)]


def _reference_run(
    reference: Part, case: Case, streams: list[FloatArray | None], layer: int | None, threshold: float
) -> _ReferenceRun:
    forced = None if layer is None else case.forced([layer])
    reference.reset(case.batch)
    run = _ReferenceRun([], [])
    for index, feed in enumerate(case.feeds):
        given = None if forced is None or layer is None else forced[index][layer]
        run.outputs.append(reference.step(streams[index], feed, given))
        scores = run.outputs[-1].scores
        decided = None if scores is None else decisions({0: scores}, {0: threshold})[0]
        run.active.append(decided if given is None else given)
    return run


def _candidate_runs(
    open_part: Callable[[], AbstractContextManager[Part]],
    cases: Sequence[Case],
    references: Sequence[_ReferenceRun],
    right: _Streams,
    own: _Streams,
) -> list[_CaseRun]:
    """Of the candidate, behind the streams that are right and behind its own."""

    def run(case: Case, reference: _ReferenceRun, streams: list[FloatArray | None]) -> list[PartOutput]:
        candidate.reset(case.batch)
        return [candidate.step(*step) for step in zip(streams, case.feeds, reference.active, strict=True)]

    runs = []
    with open_part() as candidate:
        for case, reference, behind_right, behind_own in zip(cases, references, right, own, strict=True):
            outputs = run(case, reference, behind_own)
            # The first part has no stream in front of it, and nothing is off yet.
            alone = outputs if behind_own[0] is None else run(case, reference, behind_right)
            runs.append(_CaseRun(reference.outputs, outputs, alone))
    return runs


def _result(
    name: str, runs: Sequence[_CaseRun], cases: Sequence[Case], layer: int | None, threshold: float
) -> PartResult:
    own, alone = [], []
    largest: list[float] = []
    flipped: list[Flip] = []
    right_scores, scores = [], []  # of real tokens, behind the reference's stream
    compared = 0
    for run, case in zip(runs, cases, strict=True):
        for step in _shown(run, case):
            own.append(relative_errors(step.reference, step.own))
            alone.append(relative_errors(step.reference, step.alone))
            largest.append(float(np.abs(step.own - step.reference).max(initial=0.0)))
        if layer is None:
            continue
        right, found, alike = (
            {layer: np.concatenate([output.scores for output in outputs if output.scores is not None], 1)}
            for outputs in run
        )
        compared += int(case.real.sum())
        flipped += flips(right, found, case.real, {layer: threshold})
        right_scores.append(right[layer][case.real])
        scores.append(alike[layer][case.real])
    return PartResult(
        name,
        error=float(np.concatenate(own).mean()),
        largest=float(np.max(largest)),  # NaN where one is
        alone=float(np.concatenate(alone).mean()),
        worst_alone=float(np.concatenate(alone).max()),
        decisions=compared,
        flips=tuple(flipped),
        scores=NO_SCORES if layer is None else _score_statistics(layer, right_scores, scores),
    )


def _score_statistics(layer: int, right: Sequence[FloatArray], found: Sequence[FloatArray]) -> ScoreStatistics:
    """Of one layer, over the real tokens of all cases: float32 [tokens] each."""
    wanted, scores = ({layer: np.concatenate(each)[np.newaxis]} for each in (right, found))
    return score_statistics(wanted, scores, np.ones(wanted[layer].shape, np.bool_))


class _ShownStep(NamedTuple):
    """Values of a step's real tokens, [tokens, width]: of `_CaseRun`'s three, where all three show them."""

    reference: FloatArray
    own: FloatArray
    alone: FloatArray


def _shown(run: _CaseRun, case: Case) -> Iterator[_ShownStep]:
    for *outputs, feed in zip(*run, case.feeds, strict=True):
        # The last logits alone, where that is all a graph computes.
        columns = min(output.values.shape[1] for output in outputs)
        real = feed.real[:, -columns:]
        yield _ShownStep(*(output.values[:, -columns:][real] for output in outputs))


def _name(part: int, num_layers: int) -> str:
    if part == 0:
        return "embedding"
    return "head" if part > num_layers else f"layer {part - 1}"
