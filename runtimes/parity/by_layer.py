"""Compares a model with its reference a layer at a time: neither is ever in memory as a whole.

Every part (the embedding, each layer, the head) runs all steps of all cases before the next one is opened. What goes on
to the next part is the residual stream alone, so a cache lives as long as its layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.runtimes.parity.cases import Case, Feed
from dlo_export.runtimes.parity.report import Judgement, Verdict
from dlo_export.runtimes.parity.statistics import Flip, flips, stream_errors
from dlo_export.runtimes.parity.tolerances import TOLERANCES, Tolerance
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


@dataclasses.dataclass(frozen=True)
class PartResult:
    """One part, over the real tokens of all cases.

    Attributes:
        name: "embedding", "layer 3", "head".
        error: How far what it gives out is off, the candidate fed its own stream: the mean over tokens of |difference|
            / |reference| (norms). NaN where a value is not finite.
        largest: Largest absolute difference there.
        alone: The error where the candidate is fed the reference's stream: what this part adds by itself.
        decisions: Of its router, compared.
        flips: Those that differ, the candidate fed its own stream.
    """

    name: str
    error: float
    largest: float
    alone: float
    decisions: int
    flips: tuple[Flip, ...]

    def judge(self, tolerance: Tolerance) -> Judgement:
        """Judges what it adds and what has come together so far, then its decisions."""
        # As for streams everywhere: those of agreeing models stay below twice what logits may be off.
        allowed = 2 * tolerance.mean
        if not self.alone <= allowed:
            return Judgement(
                "FAIL", f"off by {self.alone:.1e} when fed the reference's stream, {allowed:.0e} is allowed"
            )
        if not self.error <= allowed:
            return Judgement("FAIL", f"off by {self.error:.1e}, {allowed:.0e} is allowed")
        if wide := [flip for flip in self.flips if not flip.margin <= tolerance.margin]:
            return Judgement("FAIL", f"{len(wide)} decisions flipped that are no near-ties")
        return Judgement("AMBIGUOUS", f"{len(self.flips)} near-ties flipped") if self.flips else Judgement("PASS")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The outcome of a comparison; true iff PASS.

    Attributes:
        reference: Name of the reference.
        candidate: Name of the candidate.
        dtype: Of the candidate.
        tolerance: What was allowed; None where nothing was run.
        parts: In order; those behind a part that gave no numbers were not run.
        reason: Why it was not run.
    """

    reference: str
    candidate: str
    dtype: str
    tolerance: Tolerance | None
    parts: tuple[PartResult, ...] = ()
    reason: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of all parts' judgements."""
        if self.tolerance is None:
            return "NOT RUN"
        verdicts = {part.judge(self.tolerance).verdict for part in self.parts}
        if not self.parts or "FAIL" in verdicts:
            return "FAIL"
        return "AMBIGUOUS" if "AMBIGUOUS" in verdicts else "PASS"

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    @property
    def first_failing(self) -> str | None:
        """The first part beyond its tolerance."""
        tolerance = self.tolerance
        if tolerance is None:
            return None
        return next((part.name for part in self.parts if part.judge(tolerance).verdict == "FAIL"), None)

    def to_json(self) -> dict[str, Any]:
        """Numbers that are not finite become None."""
        if self.tolerance is None:
            return {"verdict": self.verdict, "reason": self.reason}
        return {
            "verdict": self.verdict,
            "reference": self.reference,
            "candidate": self.candidate,
            "dtype": self.dtype,
            "tolerance": dataclasses.asdict(self.tolerance),
            "first_failing": self.first_failing,
            "parts": [_row(part, self.tolerance) for part in self.parts],
        }

    def summary(self) -> str:
        """A line per part."""
        if self.tolerance is None:
            return f"parity NOT RUN: {self.reason}"
        lines = [
            f"parity {self.verdict}  {self.candidate} against {self.reference}, {self.dtype}",
            f"  {'':<9} {'':<10} {'off by':>9} {'largest':>9} {'by itself':>9}  decisions",
        ]
        for part in self.parts:
            judged = part.judge(self.tolerance)
            decided = f"{len(part.flips)} of {part.decisions} flipped" if part.decisions else ""
            numbers = f"{part.error:>9.1e} {part.largest:>9.1e} {part.alone:>9.1e}"
            lines.append(f"  {judged.verdict:<9} {part.name:<10} {numbers}  {decided}".rstrip())
            if judged.reason:
                lines.append(f"{'':<12}{judged.reason}")
        if (first := self.first_failing) is not None:
            lines.append(f"the first part beyond its tolerance: {first}")
        return "\n".join(lines)


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
    differences = [*_differences(runs, cases)]
    flipped: list[Flip] = []
    compared = 0
    for run, case in zip(runs, cases, strict=True):
        if layer is None:
            break
        right, found = (
            {layer: np.concatenate([output.scores for output in outputs if output.scores is not None], 1)}
            for outputs in (run.reference, run.own)
        )
        compared += int(case.real.sum())
        flipped += flips(right, found, case.real, {layer: threshold})
    return PartResult(
        name,
        error=_stream_error(runs, cases, alone=False),
        largest=max(differences),
        alone=_stream_error(runs, cases, alone=True),
        decisions=compared,
        flips=tuple(flipped),
    )


def _shown(run: _CaseRun, case: Case) -> Iterator[tuple[FloatArray, FloatArray, FloatArray, BoolArray]]:
    """By step: the reference's values, both of the candidate's, and which tokens are real, of those it shows."""
    for right, own, alone, feed in zip(*run, case.feeds, strict=True):
        shown = own.values.shape[1]  # the last logits alone, where that is all a graph computes
        yield right.values[:, -shown:], own.values, alone.values, feed.real[:, -shown:]


def _differences(runs: Sequence[_CaseRun], cases: Sequence[Case]) -> Iterator[float]:
    for run, case in zip(runs, cases, strict=True):
        for right, own, _, real in _shown(run, case):
            yield float(np.abs(own - right)[real].max(initial=0.0))


def _stream_error(runs: Sequence[_CaseRun], cases: Sequence[Case], *, alone: bool) -> float:
    """Of all cases together, as `stream_errors` measures it."""
    rights, founds, reals = [], [], []
    for run, case in zip(runs, cases, strict=True):
        for right, own, behind_right, real in _shown(run, case):
            rights.append({0: right})
            founds.append({0: behind_right if alone else own})
            reals.append(real)
    return stream_errors(rights, founds, reals)[0]


def _name(part: int, num_layers: int) -> str:
    if part == 0:
        return "embedding"
    return "head" if part > num_layers else f"layer {part - 1}"


def _row(part: PartResult, tolerance: Tolerance) -> dict[str, Any]:
    numbers = {name: getattr(part, name) for name in ("error", "largest", "alone")}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {
        "name": part.name,
        **finite,
        "decisions": part.decisions,
        "flips": [dataclasses.asdict(flip) for flip in part.flips],
        **part.judge(tolerance)._asdict(),
    }
