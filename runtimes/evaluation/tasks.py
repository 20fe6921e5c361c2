"""Accuracy of a log-likelihood task: is the right continuation the likeliest?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dlo_export.runtimes.evaluation.batches import score_segments
from dlo_export.runtimes.evaluation.encoding import EncodedTask
from dlo_export.runtimes.evaluation.estimates import Estimate, ratio_of_blocks, scaled, share
from dlo_export.runtimes.evaluation.requests import Question
from dlo_export.runtimes.evaluation.scorer import SegmentScores, TokenScorer


@dataclass(frozen=True)
class TaskResult:
    """What a model makes of a task.

    Attributes:
        questions: How many were measured.
        requests: Their continuations.
        unconditional: Requests of the file that were left out because they repeat others without their context.
        truncated: Requests whose context lost tokens at its beginning.
        accuracy: Share of questions whose right continuation has the highest likelihood; with a single continuation,
            whose every token was the most likely one. Standard errors are binomial.
        accuracy_per_character: The same by likelihood per character of the continuation as the file writes it, leading
            space included; None where no question has a choice.
        accuracy_per_byte: Likewise per byte of UTF-8.
        gold_bits_per_byte: Negative log-likelihood in bits of the right continuations, per byte; the standard error is
            over questions.
        chosen: By question, the continuation of the highest likelihood; with a single one 0 or, where the model would
            generate something else, -1.
        active_rate: By routed layer, the share of read tokens that were active; empty where the model does not show it.
        scored_tokens: Tokens of the continuations.
        read_tokens: Tokens that the model read.
        seconds: That it took to run the model and to score.
    """

    questions: int
    requests: int
    unconditional: int
    truncated: int
    accuracy: Estimate
    accuracy_per_character: Estimate | None
    accuracy_per_byte: Estimate | None
    gold_bits_per_byte: Estimate
    chosen: tuple[int, ...]
    active_rate: dict[int, float]
    scored_tokens: int
    read_tokens: int
    seconds: float


def measure_task(
    scorer: TokenScorer,
    encoded: EncodedTask,
    *,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Scores every continuation of a task.

    Args:
        scorer: The model. Continuations of one context run together where it profits from it.
        encoded: The task.
        batch: Segments at once; None for as many as are worth while.
        progress: Called with (requests done, requests).

    Raises:
        EvaluationError: A likelihood is no number.
        StepError: The model cannot run a request.
    """
    segments = [segment for choices in encoded.segments for segment in choices]
    scored = score_segments(scorer, segments, batch=batch, share_contexts=True, progress=progress)
    questions = encoded.task.questions[: len(encoded.segments)]
    rest = iter(scored.scores)
    scores = [[next(rest) for _ in choices] for choices in encoded.segments]
    likelihoods = [np.array([-each.losses.sum() for each in choices]) for choices in scores]
    characters = [np.array([len(request.continuation) for request in question.requests]) for question in questions]
    sizes = [_bytes(question) for question in questions]
    labels = [question.label for question in questions]
    chosen = [_chosen(choices, likelihood) for choices, likelihood in zip(scores, likelihoods, strict=True)]
    gold_losses = [-float(likelihood[label]) for likelihood, label in zip(likelihoods, labels, strict=True)]
    gold_sizes = [int(size[label]) for size, label in zip(sizes, labels, strict=True)]
    has_choices = any(len(question.requests) > 1 for question in questions)

    def normalised_accuracy(lengths: Sequence[np.ndarray]) -> Estimate:
        pairs = zip(scores, likelihoods, lengths, labels, strict=True)
        return share([_chosen(choices, value / length) == label for choices, value, length, label in pairs])

    return TaskResult(
        questions=len(questions),
        requests=len(segments),
        unconditional=encoded.task.unconditional,
        truncated=encoded.truncated,
        accuracy=share([choice == label for choice, label in zip(chosen, labels, strict=True)]),
        accuracy_per_character=normalised_accuracy(characters) if has_choices else None,
        accuracy_per_byte=normalised_accuracy(sizes) if has_choices else None,
        gold_bits_per_byte=scaled(ratio_of_blocks(gold_losses, gold_sizes), 1 / math.log(2)),
        chosen=tuple(chosen),
        active_rate=scored.active_rate,
        scored_tokens=sum(segment.scored for segment in segments),
        read_tokens=scored.read,
        seconds=scored.seconds,
    )


def _chosen(choices: Sequence[SegmentScores], likelihoods: np.ndarray) -> int:
    """Number of the likeliest choice, the first of equal ones; of a single one, -1 where others were likelier."""
    if len(choices) == 1:
        return 0 if choices[0].most_likely.all() else -1
    return int(likelihoods.argmax())


def _bytes(question: Question) -> np.ndarray:
    return np.array([len(request.continuation.encode()) for request in question.requests])
