"""What an init makes of arrays in memory, for tests that compare with it."""

from __future__ import annotations

import numpy as np

from dlo_export.checkpoints.depth.layer_init import InitialTensor
from dlo_export.checkpoints.lazy_tensors import ArrayTensor


def init_tensor(
    init: str, tensor: str, source: np.ndarray, previous: np.ndarray | None = None, **settings: object
) -> np.ndarray:
    """One tensor of an injected layer; the arguments are `InitialTensor`'s, with arrays for lazy tensors."""
    before = None if previous is None else ArrayTensor(previous)
    return InitialTensor(init, tensor, ArrayTensor(source), before, **settings).numpy()
