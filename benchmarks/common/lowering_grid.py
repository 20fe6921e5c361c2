"""The steps in which lowerings are compared: how many tokens, and which of them are active in which layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

PAST = 128
"""Tokens in the cache of a decode step; prefill has none."""

SKIP_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
DECODE_BATCHES = (1, 4, 16)
PREFILL_TOKENS = (32, 128, 512)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step of the grid.

    Attributes:
        phase: What the step is.
        size: Sequences of a decode step, or tokens of a prompt.
        skipped: Share of pairs of token and layer.
        pattern: "layers" skips that share of the layers, for all tokens; "tokens" that share of every layer's tokens.
    """

    phase: Literal["decode", "prefill"]
    size: int
    skipped: float
    pattern: Literal["layers", "tokens"]

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.size if self.phase == "decode" else 1

    @property
    def sequence(self) -> int:
        """Tokens of each."""
        return 1 if self.phase == "decode" else self.size

    @property
    def past(self) -> int:
        """Tokens of each that are in the cache before."""
        return PAST if self.phase == "decode" else 0

    def past_active(self) -> np.ndarray:
        """Who of the tokens in the cache was active, bool [past]: everybody."""
        return np.ones(self.past, np.bool_)

    @property
    def step(self) -> str:
        """Which of the six steps it is a form of, such as "decode 4"."""
        return f"{self.phase} {self.size}"

    def active(self, layers: int) -> np.ndarray:
        """Who is active, bool [layers, batch, sequence]; of the share that can be had."""
        tokens = self.batch * self.sequence
        if self.pattern == "layers":
            steps = np.floor(np.arange(layers + 1) * (1 - self.skipped) + 1e-9)
            decided = np.repeat(np.diff(steps)[:, np.newaxis] > 0, tokens, axis=1)
        else:
            ranks = np.random.default_rng(0).random((layers, tokens)).argsort(axis=1)
            decided = ranks < round((1 - self.skipped) * tokens)
        return decided.reshape(layers, self.batch, self.sequence)


def cells(layers: int) -> Iterator[Cell]:
    """All of a model's, without those that are the same: of patterns that skip nothing, everything, or one token.

    Args:
        layers: Of the model; shares of them that it cannot skip are left out.
    """
    for phase, sizes in (("decode", DECODE_BATCHES), ("prefill", PREFILL_TOKENS)):
        for size in sizes:
            for skipped in SKIP_RATES:
                if skipped * layers == round(skipped * layers):
                    yield Cell(phase, size, skipped, "layers")  # type: ignore[arg-type]  # of the literals above
                if 0 < skipped < 1 and size > 1:
                    yield Cell(phase, size, skipped, "tokens")  # type: ignore[arg-type]
