"""Numbers with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: The number.
        standard_error: None where a single block cannot say.
    """

    value: float
    standard_error: float | None


def ratio_of_blocks(sums: ArrayLike, weights: ArrayLike) -> Estimate:
    """A mean over correlated things, whose error comes from the blocks they lie in.

    Neighbouring tokens are alike, so their number says too much of the error: blocks (documents, windows) are what is
    independent. The error is the linearised one of a ratio of sums, as surveys compute it of clusters.

    Args:
        sums: [blocks], for example of their tokens' losses.
        weights: [blocks], for example how many those tokens are.
    """
    block_sums, block_weights = np.asarray(sums, np.float64), np.asarray(weights, np.float64)
    value = float(block_sums.sum() / block_weights.sum())
    blocks = len(block_sums)
    if blocks < 2:
        return Estimate(value, None)
    deviations = block_sums - value * block_weights
    variance = blocks / (blocks - 1) * float((deviations**2).sum())
    return Estimate(value, math.sqrt(variance) / float(block_weights.sum()))


def share(hits: Sequence[bool]) -> Estimate:
    """A share with its binomial standard error."""
    value = sum(hits) / len(hits)
    return Estimate(value, math.sqrt(value * (1 - value) / len(hits)))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """In another unit."""
    error = None if estimate.standard_error is None else estimate.standard_error * factor
    return Estimate(estimate.value * factor, error)
