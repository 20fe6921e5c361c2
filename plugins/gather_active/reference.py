"""What `dlo::GatherActive` computes, in NumPy."""

from __future__ import annotations

import numpy as np

from dlo_export.plugins.router_scores.reference import router_scores


def gather_active(
    hidden_states: np.ndarray, router_weight: np.ndarray, threshold: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gathers the rows of the tokens whose score is above the threshold.

    Args:
        hidden_states: float32 [batch, sequence, hidden].
        router_weight: float32 [hidden, 1].
        threshold: float32, 0-D.
        values: float32 [batch, sequence, width].

    Returns:
        scores: float32 [batch, sequence]; index: int64 [active, 2], ascending; rows: float32 [active, width].
    """
    scores = router_scores(hidden_states, router_weight)
    index = np.argwhere(scores > threshold)
    return scores, index, values[tuple(index.T)]
