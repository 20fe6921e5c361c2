"""What `dlo::SkipGateUp` computes, in NumPy."""

from __future__ import annotations

import numpy as np


def skip_gate_up(
    hidden_states: np.ndarray, scale: np.ndarray, gate_weight: np.ndarray, up_weight: np.ndarray
) -> np.ndarray:
    """Computes silu(x·gate) * (x·up) for the tokens whose scale is not 0; zeros elsewhere.

    Args:
        hidden_states: T [batch, sequence, hidden], T one of float32, float16, bfloat16 (ml_dtypes).
        scale: float32 [batch, sequence].
        gate_weight: T [hidden, intermediate].
        up_weight: T [hidden, intermediate].

    Returns:
        T [batch, sequence, intermediate]; sums, silu and product are float32, rounded to T once.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    active = scale.reshape(-1) != 0
    gated = np.zeros((len(rows), gate_weight.shape[1]), hidden_states.dtype)
    x = rows[active].astype(np.float32)
    gate, up = x @ gate_weight.astype(np.float32), x @ up_weight.astype(np.float32)
    gated[active] = (_silu(gate) * up).astype(gated.dtype)
    return gated.reshape(*hidden_states.shape[:-1], gate_weight.shape[1])


def _silu(x: np.ndarray) -> np.ndarray:
    """Returns x · sigmoid(x) of float32, without overflow: exp sees negative arguments only."""
    decay = np.exp(-np.abs(x))
    silu: np.ndarray = x * np.where(x >= 0, np.float32(1), decay) / (1 + decay)
    return silu
