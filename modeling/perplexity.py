"""Perplexity, of which a model that is far off has more than a number can say."""

from __future__ import annotations

import numpy as np


def perplexity(loss: float, tokens: int) -> float:
    """Exp of the mean loss.

    Args:
        loss: Negative log-likelihood, summed over the predicted tokens.
        tokens: How many those are.

    Returns:
        Infinity where it exceeds float64, as a mean loss of 710 does.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(loss / tokens))
