"""Parity as a value: all results of a comparison, its verdict, and both in JSON and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dlo_export.checkpoints.files.json_file import finite
from dlo_export.runtimes.parity.case_result import CaseResult
from dlo_export.runtimes.parity.greedy_result import GreedyResult
from dlo_export.runtimes.parity.tolerances import Tolerance
from dlo_export.runtimes.parity.verdict import Judgement, Verdict

_FLIPS_IN_JSON = 50


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
        shown: dict[str, Any] = finite(values)
        return shown

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
                logits = f"logits within {case.logits.largest_absolute:.1e}{_routers(case)}"
                lines += _lines(case.judge(self.tolerance), f"{candidate:<{width}}  {case.case:<31} {logits}")
            for run in self.greedy:
                if run.candidate == candidate:
                    identical = f"{'greedy tokens':<31} {run.identical} of {run.total} identical"
                    lines += _lines(run.judge(), f"{candidate:<{width}}  {identical}")
        return "\n".join(lines)


def _routers(case: CaseResult) -> str:
    """What a case says of routers; nothing where nothing is routed."""
    said = f", {len(case.flips)} of {case.decisions} decisions flipped" if case.decisions else ""
    if case.scores.compared:
        said += f", scores within {case.scores.largest:.1e}"
    if layers := case.scores.not_shown:
        said += f", scores of layers {', '.join(map(str, layers))} not shown: their routers were not compared"
    return said


def _lines(judgement: Judgement, text: str) -> list[str]:
    marked = f"  {judgement.verdict:<9} {text}"
    return [marked, f"{'':<12}{judgement.reason}"] if judgement.reason else [marked]
