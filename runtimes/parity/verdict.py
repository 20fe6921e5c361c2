"""How a comparison ends, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["PASS", "FAIL", "AMBIGUOUS", "NOT RUN"]


class Judgement(NamedTuple):
    """A verdict and, where it is not PASS, why."""

    verdict: Verdict
    reason: str = ""
