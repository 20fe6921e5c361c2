"""Which segments run together, and what comes of all of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dlo_export.runtimes.evaluation.errors import EvaluationError
from dlo_export.runtimes.evaluation.scorer import Segment, SegmentScores, TokenScorer


@dataclass(frozen=True)
class ScoredSegments:
    """What was measured of segments.

    Attributes:
        scores: In their order.
        active_rate: By routed layer, the share of read tokens that were active; empty where the model does not show it.
        read: Tokens that the model read, padding left out.
        seconds: That it took.
    """

    scores: tuple[SegmentScores, ...]
    active_rate: dict[int, float]
    read: int
    seconds: float


def score_segments(
    scorer: TokenScorer,
    segments: Sequence[Segment],
    *,
    batch: int | None = None,
    share_contexts: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredSegments:
    """Scores segments in batches of similar length, the longest first: if memory ends, it ends at once.

    Args:
        scorer: The model.
        segments: At least one.
        batch: Segments at once; None for as many as make the scorer's `tokens_at_once`.
        share_contexts: Run together what has the same tokens before the scored ones, where the scorer profits from it.
        progress: Called with (segments done, segments).

    Raises:
        EvaluationError: A likelihood is no number: the model's weights are damaged, or its numbers overflow.
        StepError: The model cannot run them.
    """
    found: list[SegmentScores | None] = [None] * len(segments)
    active: dict[int, int] = defaultdict(int)
    read = done = 0
    start = time.perf_counter()
    for numbers in _batches(scorer, segments, batch, share=share_contexts and scorer.shares_contexts):
        result = scorer.score([segments[number] for number in numbers])
        for number, scores in zip(numbers, result.segments, strict=True):
            if not np.isfinite(scores.losses).all():
                raise EvaluationError(
                    f"{scorer.name}: gives a token no finite likelihood",
                    hint="its weights hold NaN or infinity, or numbers of 16 bits overflow: try the model in fp32",
                )
            found[number] = scores
        read += result.read
        for layer, count in result.active.items():
            active[layer] += count
        done += len(numbers)
        if progress is not None:
            progress(done, len(segments))
    rates = {layer: count / read for layer, count in sorted(active.items())}
    scored = tuple(scores for scores in found if scores is not None)
    return ScoredSegments(scored, rates, read, time.perf_counter() - start)


def _batches(scorer: TokenScorer, segments: Sequence[Segment], batch: int | None, *, share: bool) -> list[list[int]]:
    """Numbers of segments that run together."""
    alone = list(range(len(segments)))
    at_once = scorer.tokens_at_once
    batches: list[list[int]] = []
    if share:
        groups: dict[bytes, list[int]] = defaultdict(list)
        for number, segment in enumerate(segments):
            groups[segment.ids[: segment.start].tobytes()].append(number)
        for numbers in groups.values():
            if len(numbers) > 1:
                batches += _cut(numbers, batch, at_once, [segments[number].scored for number in numbers])
        alone = [numbers[0] for numbers in groups.values() if len(numbers) == 1]
    alone.sort(key=lambda number: segments[number].read, reverse=True)
    batches += _cut(alone, batch, at_once, [segments[number].read for number in alone])
    return sorted(batches, key=lambda numbers: segments[numbers[0]].read, reverse=True)


def _cut(numbers: Sequence[int], batch: int | None, tokens_at_once: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """In pieces of `batch`, or of so many tokens when all are as long as the longest."""
    piece: list[int] = []
    longest = 0
    for number, length in zip(numbers, lengths, strict=True):
        longest = max(longest, length)
        is_full = len(piece) == batch if batch else (len(piece) + 1) * longest > tokens_at_once
        if piece and is_full:
            yield piece
            piece, longest = [], length
        piece.append(number)
    if piece:
        yield piece
