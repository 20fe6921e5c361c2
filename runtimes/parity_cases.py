"""What parity runs: deterministic inputs that reach every path of a cached, batched, routed decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Decisions to force on the reference too; None lets its routers decide.
Forcing = Literal["all", "none", "mixed"] | None

PROMPT_TOKENS = 24
DECODE_STEPS = 4


@dataclass(frozen=True)
class Feed:
    """Inputs of one forward pass.

    Attributes:
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, past + sequence].
        position_ids: int64 [batch, sequence].
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """bool [batch, sequence]: which of the tokens are not padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].astype(bool)


@dataclass(frozen=True)
class Case:
    """A sequence of forward passes that share a cache.

    Attributes:
        name: For reports.
        feeds: The passes.
        forcing: Decisions forced on reference and candidates alike.
    """

    name: str
    feeds: tuple[Feed, ...]
    forcing: Forcing = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.feeds[0].input_ids.shape[0])

    def forced(self, feed: Feed, routed_layers: Sequence[int]) -> dict[int, np.ndarray] | None:
        """The decisions of `forcing` for one pass: bool [batch, sequence] by layer."""
        if self.forcing is None:
            return None
        shape = feed.input_ids.shape
        if self.forcing == "mixed":
            rng = np.random.default_rng(feed.attention_mask.shape[1])
            return {layer: rng.random(shape) < 0.5 for layer in routed_layers}
        return {layer: np.full(shape, self.forcing == "all") for layer in routed_layers}


def parity_cases(vocab_size: int, *, routed: bool, seed: int = 0) -> tuple[Case, ...]:
    """Prefill; decode with a cache; a left-padded batch without and with a cache; forced decisions where routed."""
    rng = np.random.default_rng(seed)
    one = [rng.integers(0, vocab_size, PROMPT_TOKENS + DECODE_STEPS)]
    ragged = [rng.integers(0, vocab_size, length) for length in (PROMPT_TOKENS, PROMPT_TOKENS // 2, PROMPT_TOKENS // 3)]
    cases = [
        Case("prefill", _feeds(one, 0)),
        Case("decode with a cache", _feeds(one, DECODE_STEPS)),
        Case("left-padded batch", _feeds(ragged, 0)),
        Case("left-padded batch with a cache", _feeds(ragged, DECODE_STEPS)),
    ]
    if routed:
        cases += [
            Case("all active", _feeds(one, 1), "all"),
            Case("nothing active", _feeds(one, 1), "none"),
            Case("mixed decisions", _feeds(ragged, DECODE_STEPS), "mixed"),
        ]
    return tuple(cases)


def _feeds(sequences: Sequence[np.ndarray], decode_steps: int) -> tuple[Feed, ...]:
    """Left-pads the sequences to one length; the last `decode_steps` columns are passes of their own."""
    length, batch = max(len(ids) for ids in sequences), len(sequences)
    ids, mask, positions = (np.zeros((batch, length), np.int64) for _ in range(3))
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = 1
        positions[row, length - len(sequence) :] = np.arange(len(sequence))
    cuts = [0, *range(length - decode_steps, length + 1)]
    return tuple(
        Feed(ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    )
