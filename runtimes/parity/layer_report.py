"""Parity a layer at a time as a value: what each part is off by, and the verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlo_export.checkpoints.files.json_file import finite
from dlo_export.runtimes.parity.statistics import NO_SCORES, Flip, ScoreStatistics
from dlo_export.runtimes.parity.tolerances import Tolerance
from dlo_export.runtimes.parity.verdict import Judgement, Verdict


@dataclasses.dataclass(frozen=True)
class PartResult:
    """One part, over the real tokens of all cases.

    Attributes:
        name: "embedding", "layer 3", "head".
        error: How far what it gives out is off, the candidate fed its own stream: the mean over tokens of |difference|
            / |reference| (norms). NaN where a value is not finite.
        largest: Largest absolute difference there.
        alone: The error where the candidate is fed the reference's stream: what this part adds by itself.
        worst_alone: Likewise, of the token that is off most.
        decisions: Of its router, compared.
        flips: Those that differ, the candidate fed its own stream.
        scores: How far its router's scores are off where the candidate is fed the reference's stream.
    """

    name: str
    error: float
    largest: float
    alone: float
    worst_alone: float
    decisions: int
    flips: tuple[Flip, ...]
    scores: ScoreStatistics = NO_SCORES

    def judge(self, tolerance: Tolerance) -> Judgement:
        """Judges what it adds and what has come together so far, then its decisions and the scores they are made of."""
        # As for streams everywhere: those of agreeing models stay below twice what logits may be off.
        allowed, allowed_once = 2 * tolerance.mean, 2 * tolerance.largest
        if not self.alone <= allowed:
            return Judgement(
                "FAIL", f"off by {self.alone:.1e} when fed the reference's stream, {allowed:.0e} is allowed"
            )
        if not self.worst_alone <= allowed_once:  # one wrong token of hundreds does not show in a mean
            said = f"a token is off by {self.worst_alone:.1e} when fed the reference's stream"
            return Judgement("FAIL", f"{said}, {allowed_once:.0e} is allowed")
        if not self.error <= allowed:
            return Judgement("FAIL", f"off by {self.error:.1e}, {allowed:.0e} is allowed")
        if wide := [flip for flip in self.flips if not flip.margin <= tolerance.margin]:
            return Judgement("FAIL", f"{len(wide)} decisions flipped that are no near-ties")
        if not self.scores.within(tolerance):
            off = f"{self.scores.off(tolerance)} when fed the reference's stream"
            return Judgement("FAIL", f"scores of its router differ: {off}")
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


def _row(part: PartResult, tolerance: Tolerance) -> dict[str, Any]:
    numbers = {name: getattr(part, name) for name in ("error", "largest", "alone", "worst_alone")}
    return {
        "name": part.name,
        **finite(numbers),
        "decisions": part.decisions,
        "scores": finite(dataclasses.asdict(part.scores)),
        "flips": [dataclasses.asdict(flip) for flip in part.flips],
        **part.judge(tolerance)._asdict(),
    }
