"""Perplexity of a text, and how many tokens are active on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dlo_export.modeling.perplexity import perplexity
from dlo_export.runtimes.evaluation.batches import score_segments
from dlo_export.runtimes.evaluation.encoding import Window
from dlo_export.runtimes.evaluation.errors import EvaluationError
from dlo_export.runtimes.evaluation.estimates import Estimate, ratio_of_blocks, scaled
from dlo_export.runtimes.evaluation.scorer import TokenScorer

# With fewer blocks, their spread says little.
_ENOUGH_DOCUMENTS = 8


@dataclass(frozen=True)
class Perplexity:
    """How well a model foretells a text.

    Attributes:
        windows: How many were run.
        scored_tokens: Tokens that were predicted.
        nats_per_token: Mean negative log-likelihood of those.
        perplexity: Exp of it.
        bits_per_byte: Their negative log-likelihood in bits, per byte of their text in UTF-8; None where those were not
            counted. What models of different tokenizers are compared by.
        error_over: What the standard errors take as independent.
        active_rate: By routed layer, the share of read tokens that were active; empty where the model does not show it.
        read_tokens: Tokens that the model read: more than the scored ones where windows overlap.
        seconds: That it took to run the model and to score.
    """

    windows: int
    scored_tokens: int
    nats_per_token: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate | None
    error_over: Literal["documents", "windows"]
    active_rate: dict[int, float]
    read_tokens: int
    seconds: float


def measure_perplexity(
    scorer: TokenScorer,
    windows: Sequence[Window],
    *,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores the windows of a text.

    Args:
        scorer: The model.
        windows: Whatever overlaps, each token is scored in one of them.
        batch: Windows at once; None for as many as are worth while.
        progress: Called with (windows done, windows).

    Raises:
        EvaluationError: There is nothing to predict, or a likelihood is no number.
        StepError: The model cannot run them.
    """
    if not windows or min(window.segment.scored for window in windows) < 1:
        raise EvaluationError(
            "perplexity: there is no token to predict", hint="give more text: a first token is foretold by nothing"
        )
    scored = score_segments(scorer, [window.segment for window in windows], batch=batch, progress=progress)
    documents = {window.document for window in windows}
    by_document = len(documents) >= _ENOUGH_DOCUMENTS
    blocks = [window.document if by_document else number for number, window in enumerate(windows)]
    losses = _block_sums(blocks, [float(scores.losses.sum()) for scores in scored.scores])
    tokens = _block_sums(blocks, [window.segment.scored for window in windows])
    total = int(tokens.sum())
    nats = ratio_of_blocks(losses, tokens)
    value = perplexity(float(losses.sum()), total)
    # The error of a function of the mean, to the first order.
    error = None if nats.standard_error is None else value * nats.standard_error
    sizes = [window.scored_bytes for window in windows]
    bits = None
    if all(size is not None for size in sizes):
        per_byte = ratio_of_blocks(losses, _block_sums(blocks, [size or 0 for size in sizes]))
        bits = scaled(per_byte, 1 / math.log(2))
    return Perplexity(
        windows=len(windows),
        scored_tokens=total,
        nats_per_token=nats,
        perplexity=Estimate(value, error),
        bits_per_byte=bits,
        error_over="documents" if by_document else "windows",
        active_rate=scored.active_rate,
        read_tokens=scored.read,
        seconds=scored.seconds,
    )


def _block_sums(blocks: Sequence[int], values: Sequence[float]) -> np.ndarray:
    """Sums of values by their blocks' numbers, float64, blocks in order of their numbers."""
    _, places = np.unique(blocks, return_inverse=True)
    return np.bincount(places, weights=values)
