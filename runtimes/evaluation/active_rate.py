"""How many tokens of a text are active, without the logits that perplexity takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlo_export.runtimes.evaluation.scorer import active_tokens
from dlo_export.runtimes.runner import Int64Array, Runner


def measure_active_rate(runner: Runner, texts: Sequence[Int64Array]) -> dict[int, float]:
    """By routed layer, the share of tokens that are active; empty where the runner does not show it.

    Args:
        runner: Reset for every text.
        texts: int64 [length] each.

    Raises:
        StepError: They do not fit the model, or the runtime fails.
    """
    counts: dict[int, int] = {}
    for ids in texts:
        runner.reset(1)
        row = ids[np.newaxis]
        result = runner.step(row, np.ones_like(row), np.arange(len(ids))[np.newaxis], last_logits=True)
        for layer, count in active_tokens(result.router_scores, [len(ids)], runner.thresholds).items():
            counts[layer] = counts.get(layer, 0) + count
    return {layer: count / sum(map(len, texts)) for layer, count in sorted(counts.items())}
