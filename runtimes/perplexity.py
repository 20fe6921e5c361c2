"""Perplexity and active rate of a runner on tokens it has not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from dlo_export.modeling.perplexity import perplexity
from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.runner import Int64Array, Runner


class PerplexityError(RuntimeInputError):
    """There is no next token to predict."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but each window's first.
        predicted_tokens: How many those are.
        active_rate: By routed layer, share of all tokens that were active; empty where the runner shows no scores.
    """

    perplexity: float
    predicted_tokens: int
    active_rate: dict[int, float]


def measure_perplexity(
    runner: Runner, windows: Int64Array, *, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Feeds each window alone, without context from the one before.

    Args:
        runner: Reset for every window.
        windows: int64 [windows, length], at least two tokens long.
        progress: Called with (windows done, windows).

    Raises:
        PerplexityError: There are no windows, or they are too short.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise PerplexityError(
            f"perplexity: got windows of shape {list(windows.shape)}, expected [windows, length >= 2]",
            hint="give more text: a window's first token is predicted from nothing, so it needs a second",
        )
    total = 0.0
    active: dict[int, int] = {}
    length = windows.shape[1]
    positions = np.arange(length)[np.newaxis]
    for done, window in enumerate(windows, start=1):
        runner.reset(1)
        result = runner.step(window[np.newaxis], np.ones((1, length), np.int64), positions)
        total += _negative_log_likelihood(result.logits[0, :-1], window[1:])
        for layer, decided in runner.active(result.router_scores).items():
            active[layer] = active.get(layer, 0) + int(decided.sum())
        if progress is not None:
            progress(done, len(windows))
    predicted = windows.shape[0] * (length - 1)
    rates = {layer: count / windows.size for layer, count in sorted(active.items())}
    return Perplexity(perplexity(total, predicted), predicted, rates)


def _negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over tokens; logits float32 [tokens, vocab]."""
    highest = logits.max(-1)
    log_sums = highest + np.log(np.exp(logits - highest[:, np.newaxis]).sum(-1, dtype=np.float64))
    return float((log_sums - logits[np.arange(len(targets)), targets]).sum())
