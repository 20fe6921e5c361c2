"""What evaluation asks of a model: how likely tokens are behind others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dlo_export.modeling.perplexity import score_array
from dlo_export.runtimes.runner import BoolArray, FloatArray, Int64Array, Runner, StepResult, decisions


@dataclass(frozen=True)
class Segment:
    """Tokens of which the last ones are scored, each by all before it.

    Attributes:
        ids: int64 [length]. The model reads all but the last, which nothing is foretold by.
        start: The first that is scored, at least 1.
    """

    ids: Int64Array
    start: int

    @property
    def read(self) -> int:
        """Tokens that the model reads."""
        return len(self.ids) - 1

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class SegmentScores:
    """Of a segment's scored tokens.

    Attributes:
        losses: Negative log-likelihoods in nats, float64 [scored].
        most_likely: Whether no other token was likelier, bool [scored].
    """

    losses: NDArray[np.float64]
    most_likely: BoolArray


@dataclass(frozen=True)
class BatchScores:
    """Of segments that ran together.

    Attributes:
        segments: In their order.
        read: Tokens the model read for them, without padding; what segments share was read once.
        active: By routed layer, how many of those were active; empty where the model does not show it.
    """

    segments: tuple[SegmentScores, ...]
    read: int
    active: Mapping[int, int]


class TokenScorer(Protocol):
    """A model as evaluation sees it.

    Attributes:
        name: What runs it, for reports.
        shares_contexts: Whether segments that begin alike are worth scoring together: what they share runs once.
        tokens_at_once: How many are worth running together, padding counted.
    """

    name: str
    shares_contexts: bool
    tokens_at_once: int

    def score(self, segments: Sequence[Segment]) -> BatchScores:
        """Scores segments together.

        Raises:
            StepError: They do not fit the model, or the runtime fails.
        """


CPU_TOKENS_AT_ONCE = 1024
"""More makes no processor faster, and takes memory: logits of 1,024 tokens are 200 MB of 49,152 words."""


class LogitsScorer:
    """Of anything that answers logits.

    Args:
        answer: Logits, and router scores where there are any, of int64 [batch, sequence] without a cache; padding
            stands at the right, where a causal decoder's other tokens do not see it.
        name: For reports.
        thresholds: Of its routers, see `Runner`.
    """

    shares_contexts = False
    tokens_at_once = CPU_TOKENS_AT_ONCE

    def __init__(
        self,
        answer: Callable[[Int64Array], StepResult],
        name: str = "model",
        thresholds: Mapping[int, float] | None = None,
    ) -> None:
        self.name = name
        self._answer = answer
        self._thresholds = dict(thresholds or {})

    def score(self, segments: Sequence[Segment]) -> BatchScores:
        """See `TokenScorer`."""
        result = self._answer(padded_ids([segment.ids[:-1] for segment in segments]))
        scores = tuple(
            SegmentScores(*score_array(logits[segment.start - 1 : segment.read], segment.ids[segment.start :]))
            for segment, logits in zip(segments, result.logits, strict=True)
        )
        lengths = [segment.read for segment in segments]
        return BatchScores(scores, sum(lengths), active_tokens(result.router_scores, lengths, self._thresholds))


class RunnerScorer(LogitsScorer):
    """Of a runner, which is reset for every batch.

    Args:
        runner: Open; whoever opened it closes it.
    """

    shares_contexts = True

    def __init__(self, runner: Runner) -> None:
        super().__init__(self._prefilled, runner.name, runner.thresholds)
        self._runner = runner

    def score(self, segments: Sequence[Segment]) -> BatchScores:
        """See `TokenScorer`."""
        if not begin_alike(segments):
            return super().score(segments)
        # The context runs once, and foretells every first token; the cache behind it is continued by each segment.
        start = segments[0].start
        context = self._prefilled(segments[0].ids[np.newaxis, :start], last_logits=True)
        firsts = np.repeat(context.logits[0, -1:], len(segments), 0)
        losses, most_likely = score_array(firsts, np.array([segment.ids[start] for segment in segments]))
        scores = [SegmentScores(losses[i : i + 1], most_likely[i : i + 1]) for i in range(len(segments))]
        active = active_tokens(context.router_scores, [start], self._thresholds)
        lengths = [segment.read - start for segment in segments]
        if any(lengths):
            result = self._continued(padded_ids([segment.ids[start:-1] for segment in segments]), start)
            for i, segment in enumerate(segments):
                later = score_array(result.logits[i, : lengths[i]], segment.ids[start + 1 :])
                scores[i] = SegmentScores(
                    np.concatenate([scores[i].losses, later[0]]), np.concatenate([scores[i].most_likely, later[1]])
                )
            for layer, count in active_tokens(result.router_scores, lengths, self._thresholds).items():
                active[layer] += count
        return BatchScores(tuple(scores), start + sum(lengths), active)

    def _prefilled(self, ids: Int64Array, *, last_logits: bool = False) -> StepResult:
        self._runner.reset(len(ids))
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return self._runner.step(ids, np.ones_like(ids), positions, last_logits=last_logits)

    def _continued(self, ids: Int64Array, past: int) -> StepResult:
        self._runner.fork(len(ids))
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        return self._runner.step(ids, mask, np.broadcast_to(np.arange(past, mask.shape[1]), ids.shape))


def begin_alike(segments: Sequence[Segment]) -> bool:
    """Whether several segments have the same tokens, more than one, before the first that is scored."""
    first = segments[0]
    return len(segments) > 1 < first.start and all(
        segment.start == first.start and np.array_equal(segment.ids[: segment.start], first.ids[: first.start])
        for segment in segments
    )


def padded_ids(sequences: Sequence[Int64Array]) -> Int64Array:
    """int64 [batch, longest]: token 0 behind the shorter ones."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids


def active_tokens(
    router_scores: Mapping[int, FloatArray], lengths: Sequence[int], thresholds: Mapping[int, float]
) -> dict[int, int]:
    """By layer, how many tokens are active, padding left out.

    Args:
        router_scores: float32 [batch, sequence].
        lengths: Of the sequences without padding.
        thresholds: By layer, where it is not one half.
    """
    return {
        layer: sum(int(row[:length].sum()) for row, length in zip(active, lengths, strict=True))
        for layer, active in decisions(router_scores, thresholds).items()
    }
