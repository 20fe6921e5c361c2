"""What `dlo::RouterScores` computes, in NumPy."""

from __future__ import annotations

import numpy as np


def router_scores(hidden_states: np.ndarray, router_weight: np.ndarray) -> np.ndarray:
    """Computes sigmoid(x · w), all of it in float32.

    Args:
        hidden_states: T [batch, sequence, hidden], T one of float32, float16, bfloat16 (ml_dtypes).
        router_weight: float32 [hidden, 1].

    Returns:
        float32 [batch, sequence].
    """
    logits = (hidden_states.astype(np.float32) @ router_weight)[..., 0]
    decay = np.exp(-np.abs(logits))  # of negative arguments only: no overflow
    scores: np.ndarray = np.where(logits >= 0, np.float32(1), decay) / (1 + decay)
    return scores
