"""Parity as a value: statistics, verdict, tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Verdict = Literal["PASS", "FAIL", "AMBIGUOUS", "NOT RUN"]


@dataclass(frozen=True)
class Tolerance:
    """How far a candidate may be off.

    Attributes:
        logits: Largest absolute difference of a logit, relative to max(1, largest reference logit / 10).
        margin: A decision may flip where the reference's |score - 0.5| is below this: a near-tie.
        why: Where the numbers come from.
    """

    logits: float
    margin: float
    why: str


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(5e-4, 1e-5, "fp32 sums in another order: 1.2e-4 measured at 30 layers, hidden size 576"),
    "fp16": Tolerance(0.25, 5e-3, "2^-11 of a logit of 30, accumulated over the layers"),
    "bf16": Tolerance(2.0, 4e-2, "2^-8 of a logit of 30, accumulated over the layers"),
}


@dataclass(frozen=True)
class Flip:
    """A token whose decision differs from the reference's.

    Attributes:
        layer: Where.
        row: Sequence of the batch.
        position: Column of the pass.
        reference_score: The router's score there; the margin is its distance from 0.5.
        candidate_score: The same of the candidate.
    """

    layer: int
    row: int
    position: int
    reference_score: float
    candidate_score: float

    @property
    def margin(self) -> float:
        """|reference_score - 0.5|."""
        return abs(self.reference_score - 0.5)


@dataclass(frozen=True)
class CaseResult:
    """One case on one candidate.

    Attributes:
        case: Name of the case.
        candidate: Name of the runner.
        compared: Logits compared (real tokens only).
        max_difference: Largest absolute difference of a logit; NaN where either side is not finite.
        max_reference: Largest absolute reference logit.
        decisions: Decisions compared.
        flips: Those that differ.
        first_diverging_layer: First layer whose residual stream is off, where streams were exposed.
    """

    case: str
    candidate: str
    compared: int
    max_difference: float
    max_reference: float
    decisions: int
    flips: tuple[Flip, ...]
    first_diverging_layer: int | None = None

    def close(self, tolerance: Tolerance) -> bool:
        """Whether the logits are within tolerance; False where nothing was compared or a value is not finite."""
        allowed = tolerance.logits * max(1.0, self.max_reference / 10)
        return self.compared > 0 and self.max_difference <= allowed

    def decided(self, tolerance: Tolerance) -> bool:
        """Whether only near-ties flipped."""
        return all(flip.margin <= tolerance.margin for flip in self.flips)


@dataclass
class ParityReport:
    """The outcome of a comparison; true iff PASS.

    Attributes:
        tolerance: What was allowed.
        results: Case by case.
        greedy: Tokens of reference and candidate, by candidate.
        reason: Why it was not run.
    """

    tolerance: Tolerance | None
    results: list[CaseResult] = field(default_factory=list)
    greedy: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    reason: str | None = None

    @classmethod
    def not_run(cls, reason: str) -> ParityReport:
        """A comparison that could not be made."""
        return cls(None, reason=reason)

    @property
    def verdict(self) -> Verdict:
        """PASS; AMBIGUOUS where only near-ties flipped; FAIL, also where nothing was compared; NOT RUN."""
        if self.tolerance is None:
            return "NOT RUN"
        tolerance = self.tolerance
        if not self.results or not all(
            result.close(tolerance) and result.decided(tolerance) for result in self.results
        ):
            return "FAIL"
        flipped = any(result.flips for result in self.results)
        if any(expected != got for expected, got in self.greedy.values()):
            return "AMBIGUOUS" if flipped else "FAIL"
        return "AMBIGUOUS" if flipped else "PASS"

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "tolerance": asdict(self.tolerance) if self.tolerance else None,
            "cases": [asdict(result) for result in self.results],
            "greedy": {
                name: {"reference": expected, "candidate": got} for name, (expected, got) in self.greedy.items()
            },
        }

    def summary(self) -> str:
        """The report in words, a line per case and candidate."""
        if self.tolerance is None:
            return f"parity NOT RUN: {self.reason}"
        lines = [f"parity {self.verdict}"]
        for result in self.results:
            mark = "ok " if result.close(self.tolerance) and result.decided(self.tolerance) else "BAD"
            lines.append(
                f"  {mark} {result.candidate:<8} {result.case:<32} max |Δlogit| {result.max_difference:.1e}"
                f"  flips {len(result.flips)} of {result.decisions}{_worst(result.flips)}{_divergence(result)}"
            )
        for name, (expected, got) in self.greedy.items():
            same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), len(expected))
            mark = "ok " if expected == got else "BAD"
            lines.append(f"  {mark} {name:<8} {'greedy tokens':<32} {same} of {len(expected)} identical")
        return "\n".join(lines)


def _worst(flips: Sequence[Flip]) -> str:
    if not flips:
        return ""
    worst = max(flips, key=lambda flip: flip.margin)
    return f" (widest margin {worst.margin:.1e} in layer {worst.layer})"


def _divergence(result: CaseResult) -> str:
    layer = result.first_diverging_layer
    return "" if layer is None else f"  first diverging layer {layer}"


def largest_difference(expected: np.ndarray, got: np.ndarray) -> float:
    """Largest absolute difference, NaN where either array holds something that is not finite."""
    if not expected.size:
        return 0.0
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return float("nan")
    return float(np.abs(expected - got).max())
