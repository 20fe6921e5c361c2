"""Parity as a value: statistics, judgements, verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from dlo_export.runtimes.parity.statistics import Flip, LogitStatistics
from dlo_export.runtimes.parity.tolerances import OwnError, Tolerance

Verdict = Literal["PASS", "FAIL", "AMBIGUOUS", "NOT RUN"]

_FLIPS_IN_JSON = 50
_FLIPS_IN_REASON = 3


class Judgement(NamedTuple):
    """A verdict and, where it is not PASS, why."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class OwnRun:
    """The released graph, its own routers deciding, against the reference made to decide as it did.

    Attributes:
        logits: Under the candidate's decisions.
        flips: Where the reference, behind layers that obeyed the candidate's decisions, would have decided otherwise.
    """

    logits: LogitStatistics
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class CaseResult:
    """One case on one candidate.

    Attributes:
        case: Name of the case.
        candidate: Name of the candidate.
        logits: Under the reference's decisions.
        free_logits: With the candidate's own routers deciding; None where decisions are forced or nothing is routed.
        decisions: Decisions compared.
        flips: Those that differ, each made behind layers that obeyed the reference's decisions.
        stream_errors: By layer, how far the residual streams are apart; empty where not looked at.
        first_diverging_layer: The first whose stream is off.
        own_error: Of the reference on this case; measured only where the table's tolerance was exceeded, or decisions
            flipped.
        score_error: Mean absolute difference of scores, under the reference's decisions.
        own_run: Where decisions flipped that were the candidate's own to take; None where nobody could see them.
    """

    case: str
    candidate: str
    logits: LogitStatistics
    free_logits: LogitStatistics | None
    decisions: int
    flips: tuple[Flip, ...]
    stream_errors: Mapping[int, float] = field(default_factory=dict)
    first_diverging_layer: int | None = None
    own_error: OwnError | None = None
    score_error: float = 0.0
    own_run: OwnRun | None = None

    def judge(self, tolerance: Tolerance) -> Judgement:
        """Judges by the table, and where that fails, by the reference's own error.

        Args:
            tolerance: The table's.
        """
        strict = self._judge(tolerance)
        if strict.verdict != "FAIL" or self.own_error is None:
            return strict
        own = self.own_error
        said = (
            f"{own.compared} by mean {own.mean:.1e} and largest {own.largest:.1e} of the peak, "
            f"scores {own.score:.1e}, and {tolerance.own_errors} times that is allowed"
        )
        by_own = self._judge(tolerance.widened(own))
        if by_own.verdict != "FAIL":
            return Judgement(by_own.verdict, f"{by_own.reason or 'as exact as the reference'}: {said}")
        if self._judge(tolerance.widened(own, limit=math.inf)).verdict != "FAIL":
            return Judgement("AMBIGUOUS", f"the model amplifies rounding so far that a wrong one might pass: {said}")
        return Judgement("FAIL", f"{by_own.reason}; the reference: {said}")

    def _judge(self, tolerance: Tolerance) -> Judgement:
        """Judges logits, then decisions, then the free run."""
        if not self.logits.compared:
            return Judgement("FAIL", "nothing was compared")
        if not self.logits.within(tolerance):
            return Judgement("FAIL", f"logits differ: {_place(self.logits)}{self._divergence()}")
        if wide := [flip for flip in self.flips if not flip.margin <= tolerance.margin]:
            return Judgement("FAIL", f"{len(wide)} decisions flipped that are no near-ties: {_named(wide)}")
        if self.flips:
            return self._judge_flips(tolerance)
        if self.free_logits is not None and not self.free_logits.within(tolerance):
            return Judgement(
                "FAIL",
                f"no decision flipped, but logits differ when its own routers decide: {_place(self.free_logits)}",
            )
        return Judgement("PASS")

    def _judge_flips(self, tolerance: Tolerance) -> Judgement:
        """Near-ties flipped: PASS where what they led to is right, and all is seen to be rounding."""
        said = f"{len(self.flips)} near-ties flipped: {_named(self.flips)}"
        if self.own_run is not None:
            if not self.own_run.logits.within(tolerance):
                place = _place(self.own_run.logits)
                return Judgement(
                    "FAIL", f"{said}; logits differ under the decisions that its own routers took: {place}"
                )
            if wide := [flip for flip in self.own_run.flips if not flip.margin <= tolerance.margin]:
                return Judgement("FAIL", f"{said}; {len(wide)} decisions of its own are no near-ties: {_named(wide)}")
        if self.own_error is None or (self.free_logits is not None and self.own_run is None):
            return Judgement("AMBIGUOUS", said)
        return self._judge_scores(said, tolerance.own_errors, self.own_error)

    def _judge_scores(self, said: str, times: int, own: OwnError) -> Judgement:
        """A decision is its score: flips are rounding where all scores, and these, are off by the reference's own."""
        flips = self.flips if self.own_run is None else (*self.flips, *self.own_run.flips)
        margin = max(flip.margin for flip in flips)
        agree = self.score_error <= times * own.score_mean and margin <= times * own.score
        off = f"scores are off by mean {self.score_error:.1e}, margins are at most {margin:.1e}"
        compared = f"{own.compared} by mean {own.score_mean:.1e} and largest {own.score:.1e}"
        return Judgement("PASS" if agree else "AMBIGUOUS", f"{said}; {off}, and {compared} there")

    def _divergence(self) -> str:
        if not self.stream_errors:
            return ""
        if self.first_diverging_layer is None:
            return "; residual streams agree behind every layer, so the final norm or the head differs"
        error = self.stream_errors[self.first_diverging_layer]
        return f"; first diverging layer {self.first_diverging_layer} (residual stream off by {error:.1e})"


@dataclass(frozen=True)
class GreedyDifference:
    """The first token of a sequence that is not the reference's choice.

    Attributes:
        row: Sequence of the batch.
        index: Among the new tokens.
        gap: By how much the reference prefers its own.
        error: There, the candidate's largest logit difference under equal decisions.
        flips: Decisions that flipped in the sequence so far, where these are the reference's; 0 where they are the
            candidate's own, which the reference was made to take.
        rounding: There, the largest difference that the reference's own rounding explains; None where not measured.
    """

    row: int
    index: int
    gap: float
    error: float
    flips: int
    rounding: float | None = None

    @property
    def near_tie(self) -> bool:
        """Whether differences of logits that were found acceptable explain it, two of them adding up."""
        return self.gap <= 2 * self.error

    @property
    def is_rounding(self) -> bool:
        """Whether the reference's own rounding would explain it, two logits being off."""
        return not self.flips and self.near_tie and self.rounding is not None and self.gap <= 2 * self.rounding


@dataclass(frozen=True)
class GreedyResult:
    """Greedy tokens of one candidate, its own routers deciding.

    The reference is fed the candidate's tokens and asked for its own choice behind each: the candidate's tokens are the
    reference's greedy tokens iff all choices agree. The same tokens, refed to the candidate, are a case of their own,
    which judges logits and decisions.

    Attributes:
        candidate: Name of the candidate.
        tokens: By sequence, the candidate's.
        differences: One for each sequence that is not the reference's.
        not_finite: Whether its logits behind these tokens were no finite numbers, so that there is no next token.
    """

    candidate: str
    tokens: tuple[tuple[int, ...], ...]
    differences: tuple[GreedyDifference, ...]
    not_finite: bool = False

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.tokens)

    @property
    def identical(self) -> int:
        """Tokens before each sequence's first difference."""
        return self.total - sum(len(self.tokens[d.row]) - d.index for d in self.differences)

    def judge(self) -> Judgement:
        """PASS if all agree, or rounding of the reference itself explains it; AMBIGUOUS where rounding may explain it.

        Flipped decisions, which are judged apart, explain a difference too.
        """
        if self.not_finite:
            return Judgement("FAIL", f"logits are not finite behind {len(self.tokens[0])} new tokens")
        if not self.total:
            return Judgement("FAIL", "nothing was compared")
        if not self.differences:
            return Judgement("PASS")
        unexplained = [d for d in self.differences if not d.near_tie and not d.flips]
        worst = max(unexplained or self.differences, key=lambda d: d.gap)
        where = f"sequence {worst.row}, new token {worst.index}: the reference's leads by {worst.gap:.1e}"
        if unexplained:
            return Judgement("FAIL", f"{where}, logits differ by {worst.error:.1e} and no decision flipped")
        if all(difference.is_rounding for difference in self.differences):
            said = f"logits differ by {worst.error:.1e}, by rounding of the reference itself {worst.rounding:.1e}"
            return Judgement("PASS", f"{where}, {said}")
        return Judgement("AMBIGUOUS", f"{where}, logits differ by {worst.error:.1e}, {worst.flips} decisions flipped")


@dataclass(frozen=True)
class ParityReport:
    """The outcome of a comparison; true iff PASS.

    Attributes:
        reference: Name of the reference.
        dtype: Of the candidates.
        tolerance: What was allowed; None where nothing was run.
        cases: Case by case.
        greedy: Candidate by candidate.
        reason: Why it was not run.
    """

    reference: str
    dtype: str
    tolerance: Tolerance | None
    cases: tuple[CaseResult, ...] = ()
    greedy: tuple[GreedyResult, ...] = ()
    reason: str | None = None

    @classmethod
    def not_run(cls, reason: str) -> ParityReport:
        """A comparison that could not be made."""
        return cls("", "", None, reason=reason)

    @classmethod
    def joined(cls, reports: Sequence[ParityReport]) -> ParityReport:
        """Comparisons of one artefact's candidates with several references, at least one, by one tolerance."""
        return replace(
            reports[0],
            reference=" and ".join(report.reference for report in reports),
            cases=tuple(case for report in reports for case in report.cases),
            greedy=tuple(result for report in reports for result in report.greedy),
        )

    @property
    def verdict(self) -> Verdict:
        """The worst of all judgements; FAIL where there are none, NOT RUN where it was not run."""
        if self.tolerance is None:
            return "NOT RUN"
        verdicts = {result.judge(self.tolerance).verdict for result in self.cases}
        verdicts |= {result.judge().verdict for result in self.greedy}
        if not self.cases or "FAIL" in verdicts:
            return "FAIL"
        return "AMBIGUOUS" if "AMBIGUOUS" in verdicts else "PASS"

    @property
    def within_table(self) -> bool:
        """Whether it passes, and by the table alone: the reference's own error was not asked for."""
        return self.verdict == "PASS" and all(case.own_error is None for case in self.cases)

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    def to_json(self) -> dict[str, Any]:
        """For parity.json; numbers that are not finite become None."""
        if self.tolerance is None:
            return {"verdict": self.verdict, "reason": self.reason}
        cases = []
        for result in self.cases:
            values = asdict(result) | {"flip_count": len(result.flips)}
            for flipped in (values, values["own_run"] or {"flips": []}):
                flipped["flips"] = flipped["flips"][:_FLIPS_IN_JSON]
            cases.append(values | result.judge(self.tolerance)._asdict())
        greedy = [asdict(result) | {"identical": result.identical} | result.judge()._asdict() for result in self.greedy]
        values = {
            "verdict": self.verdict,
            "reference": self.reference,
            "dtype": self.dtype,
            "tolerance": asdict(self.tolerance),
            "cases": cases,
            "greedy": greedy,
        }
        finite: dict[str, Any] = _finite(values)
        return finite

    def summary(self) -> str:
        """The report in words, a line per case and candidate."""
        if self.tolerance is None:
            return f"parity NOT RUN: {self.reason}"
        if not self.cases:
            return "parity FAIL: nothing was compared"
        width = max(len(case.candidate) for case in self.cases)
        lines = [f"parity {self.verdict}  against {self.reference}, {self.dtype}"]
        for candidate in dict.fromkeys(case.candidate for case in self.cases):
            for case in self.cases:
                if case.candidate != candidate:
                    continue
                decisions = f", {len(case.flips)} of {case.decisions} decisions flipped" if case.decisions else ""
                logits = f"logits within {case.logits.largest_absolute:.1e}"
                lines += _lines(
                    case.judge(self.tolerance), f"{candidate:<{width}}  {case.case:<31} {logits}{decisions}"
                )
            for run in self.greedy:
                if run.candidate == candidate:
                    identical = f"{'greedy tokens':<31} {run.identical} of {run.total} identical"
                    lines += _lines(run.judge(), f"{candidate:<{width}}  {identical}")
        return "\n".join(lines)


def _lines(judgement: Judgement, text: str) -> list[str]:
    marked = f"  {judgement.verdict:<9} {text}"
    return [marked, f"{'':<12}{judgement.reason}"] if judgement.reason else [marked]


def _place(statistics: LogitStatistics) -> str:
    return (
        f"mean {statistics.mean:.1e} and largest {statistics.largest:.1e} of the peak, "
        f"worst at sequence {statistics.row}, token {statistics.position}"
    )


def _named(flips: Iterable[Flip]) -> str:
    widest = sorted(flips, key=lambda flip: -flip.margin)
    named = [f"layer {flip.layer} token {flip.position} margin {flip.margin:.1e}" for flip in widest[:_FLIPS_IN_REASON]]
    return ", ".join([*named, "…"] if len(widest) > _FLIPS_IN_REASON else named)


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
