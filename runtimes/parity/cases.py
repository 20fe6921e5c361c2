"""What parity runs: deterministic inputs that reach every path of a cached, batched, routed decoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.generation.generate import left_padded
from dlo_export.runtimes.runner import BoolArray, Int64Array

# Who is forced to be active, on the reference too; None lets its routers decide.
ForcedActive = Literal["all", "none", "mixed"] | None

PROMPT_TOKENS = 24
CHUNK_TOKENS = 4
DECODE_STEPS = 4
LONGEST_CASE = PROMPT_TOKENS + CHUNK_TOKENS + DECODE_STEPS


@dataclass(frozen=True)
class Feed:
    """Inputs of one step.

    Attributes:
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, past + sequence].
        position_ids: int64 [batch, sequence].
    """

    input_ids: Int64Array
    attention_mask: Int64Array
    position_ids: Int64Array

    @property
    def real(self) -> BoolArray:
        """Which of the step's tokens are not padding, bool [batch, sequence]."""
        mask: BoolArray = self.attention_mask[:, -self.input_ids.shape[1] :].astype(np.bool_)
        return mask


@dataclass(frozen=True)
class Case:
    """Steps that share a cache.

    Attributes:
        name: For reports.
        feeds: The steps.
        forcing: Decisions forced on reference and candidates alike.
    """

    name: str
    feeds: tuple[Feed, ...]
    forcing: ForcedActive = None

    @property
    def batch(self) -> int:
        """How many sequences it feeds."""
        return int(self.feeds[0].input_ids.shape[0])

    @property
    def real(self) -> BoolArray:
        """Which tokens of all steps are not padding, bool [batch, tokens]."""
        return np.concatenate([feed.real for feed in self.feeds], 1)

    def forced(self, routed_layers: Sequence[int]) -> list[dict[int, BoolArray]] | None:
        """The decisions of `forcing`: per step, by layer, bool [batch, sequence]; None where routers decide."""
        if self.forcing is None:
            return None
        rng = np.random.default_rng(0)
        share = {"all": 1.0, "none": 0.0, "mixed": 0.5}[self.forcing]
        return [{layer: rng.random(feed.input_ids.shape) < share for layer in routed_layers} for feed in self.feeds]


def parity_cases(
    vocab_size: int,
    *,
    routed: bool,
    seed: int = 0,
    token_ids: Sequence[int] | None = None,
    longest: int = LONGEST_CASE,
    padded: bool = True,
) -> tuple[Case, ...]:
    """Prefill; decode behind a cache; a left-padded batch without and with a cache; forced decisions where routed.

    Args:
        vocab_size: Random tokens are drawn below it.
        routed: Whether there are decisions to force.
        seed: Of the random tokens.
        token_ids: Of a text, to use in place of random tokens.
        longest: Tokens that the shortest cache has room for, at least 1: cases are cut to fit, steps first.
        padded: Whether sequences of a batch may be of unequal length.

    Raises:
        RuntimeInputError: The text is too short.
    """
    length = min(LONGEST_CASE, longest)
    lengths = (length, max(1, length // 2), max(1, length // 3)) if padded else (length,) * 3
    batch = "left-padded batch" if padded else "batch"
    # What fits behind a first step of one token: decode steps, then the chunk before them.
    decode = (1,) * min(DECODE_STEPS, (length - 1) // 2)
    chunk = (min(CHUNK_TOKENS, length - 1 - len(decode)),) if length > 1 else ()
    tokens = np.random.default_rng(seed).integers(0, vocab_size, sum(lengths))
    if token_ids is not None:
        if len(token_ids) < tokens.size:
            raise RuntimeInputError(
                f"parity: the text has {len(token_ids)} tokens, expected at least {tokens.size}",
                hint="give a longer text, or none for random tokens",
            )
        tokens = np.asarray(token_ids[: tokens.size], np.int64)
    ragged = np.split(tokens, np.cumsum(lengths)[:-1])
    one = ragged[:1]
    cases = [
        Case("prefill", step_feeds(one)),
        # A chunk behind a cache is neither prefill nor decode: causal order and past both count.
        Case("chunk and decode with a cache", step_feeds(one, *chunk, *decode)),
        Case(batch, step_feeds(ragged)),
        Case(f"{batch} with a cache", step_feeds(ragged, *decode)),
    ]
    if routed:
        cases += [
            Case("all active", step_feeds(ragged, *decode[:1]), "all"),
            Case("nothing active", step_feeds(ragged, *decode[:1]), "none"),
            Case("mixed decisions", step_feeds(ragged, *decode), "mixed"),
        ]
    return tuple(cases)


def step_feeds(sequences: Sequence[Int64Array], *last_steps: int) -> tuple[Feed, ...]:
    """Left-pads sequences into one batch and cuts it into steps.

    Args:
        sequences: int64 [tokens] each.
        last_steps: Lengths of the steps behind the first, which takes all that is left.
    """
    ids, mask = left_padded([sequence.tolist() for sequence in sequences])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    ends = np.cumsum([ids.shape[1] - sum(last_steps), *last_steps])
    return tuple(
        Feed(ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
        for start, stop in itertools.pairwise([0, *ends.tolist()])
    )
