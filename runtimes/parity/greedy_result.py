"""Greedy tokens of one candidate: where they part from the reference's, and what may explain it."""

from __future__ import annotations

from dataclasses import dataclass

from dlo_export.runtimes.parity.verdict import Judgement


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
