"""What `dlo::SkipDown` computes, in NumPy."""

from __future__ import annotations

import numpy as np


def skip_down(gated: np.ndarray, scale: np.ndarray, down_weight: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Adds scale · (gated·down) to the residual of tokens whose scale is not 0; other rows come back bit for bit.

    Args:
        gated: T [batch, sequence, intermediate]; rows of skipped tokens are not read. T one of float32, float16,
            bfloat16 (ml_dtypes).
        scale: float32 [batch, sequence].
        down_weight: T [intermediate, hidden].
        residual: T [batch, sequence, hidden].

    Returns:
        T [batch, sequence, hidden]; sums and the addition are float32, rounded to T once.
    """
    output = residual.copy().reshape(-1, residual.shape[-1])
    factors = scale.reshape(-1)
    active = factors != 0
    branch = gated.reshape(-1, gated.shape[-1])[active].astype(np.float32) @ down_weight.astype(np.float32)
    stream = output[active].astype(np.float32)
    output[active] = (stream + factors[active, None] * branch).astype(output.dtype)
    return output.reshape(residual.shape)
