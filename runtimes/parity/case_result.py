"""One case on one candidate: what was measured, and what it means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dlo_export.runtimes.parity.statistics import NO_SCORES, Flip, LogitStatistics, ScoreStatistics
from dlo_export.runtimes.parity.tolerances import OwnError, Tolerance
from dlo_export.runtimes.parity.verdict import Judgement

_FLIPS_IN_REASON = 3


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
        scores: How far the routers' scores are off, under the reference's decisions.
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
    scores: ScoreStatistics = NO_SCORES
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
        """Judges logits, then what routers decide."""
        if not self.logits.compared:
            return Judgement("FAIL", "nothing was compared")
        if not self.logits.within(tolerance):
            return Judgement("FAIL", f"logits differ: {_place(self.logits)}{self._divergence()}")
        return self._judge_routers(tolerance)

    def _judge_routers(self, tolerance: Tolerance) -> Judgement:
        """Judges decisions, then the scores they are made of, then the free run."""
        if wide := [flip for flip in self.flips if not flip.margin <= tolerance.margin]:
            return Judgement("FAIL", f"{len(wide)} decisions flipped that are no near-ties: {_named(wide)}")
        if not self.scores.within(tolerance):
            return Judgement("FAIL", f"scores of routers differ: {self.scores.off(tolerance)}")
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
        agree = self.scores.mean <= times * own.score_mean and margin <= times * own.score
        off = f"scores are off by mean {self.scores.mean:.1e}, margins are at most {margin:.1e}"
        compared = f"{own.compared} by mean {own.score_mean:.1e} and largest {own.score:.1e}"
        return Judgement("PASS" if agree else "AMBIGUOUS", f"{said}; {off}, and {compared} there")

    def _divergence(self) -> str:
        if not self.stream_errors:
            return ""
        if self.first_diverging_layer is None:
            return "; residual streams agree behind every layer, so the final norm or the head differs"
        error = self.stream_errors[self.first_diverging_layer]
        return f"; first diverging layer {self.first_diverging_layer} (residual stream off by {error:.1e})"


def _place(statistics: LogitStatistics) -> str:
    return (
        f"mean {statistics.mean:.1e} and largest {statistics.largest:.1e} of the peak, "
        f"worst at sequence {statistics.row}, token {statistics.position}"
    )


def _named(flips: Iterable[Flip]) -> str:
    widest = sorted(flips, key=lambda flip: -flip.margin)
    named = [f"layer {flip.layer} token {flip.position} margin {flip.margin:.1e}" for flip in widest[:_FLIPS_IN_REASON]]
    return ", ".join([*named, "…"] if len(widest) > _FLIPS_IN_REASON else named)
