"""A static KV cache behind `Runner.step`: left-padded batches in, right-ragged ones out, and results put back.

`Runner.step` gets a batch whose padding stands at the left (or, for a sequence that has ended, at the right) and a mask
that grows. A static cache holds each sequence's real tokens from slot 0 on, with no padding between them: a step's real
tokens are moved to the left of their row, `write_indices` says in which slot the first one goes, `kv_lengths` how many
are in the cache behind the step. What the step computes is moved back to where its tokens were.

A graph writes a whole row, its padding too. Padding goes behind the row's tokens, where nobody looks. Where there is no
room for it, because a sequence rests while others go on, the step runs in shorter ones; a sequence whose slots are all
taken gets no more tokens, and padding goes over its last ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.runner import BoolArray, Decisions, Int64Array

Element = TypeVar("Element", bound=np.generic)


@dataclasses.dataclass(frozen=True)
class StaticCacheLimits:
    """How much fits.

    Attributes:
        max_cache: Slots for tokens, per sequence.
        max_batch: Sequences of the largest profile; None: any number.
        max_sequence: Tokens of one step in the largest profile; None: any number.
        cache_option: Of the export, that says how many slots there are.
    """

    max_cache: int
    max_batch: int | None = None
    max_sequence: int | None = None
    cache_option: str = "--trt-max-cache"


@dataclasses.dataclass(frozen=True)
class StaticCacheStep:
    """One step as the graph takes it: all that `Runner.step` got, or a part of it.

    Attributes:
        feeds: input_ids, position_ids int64 [batch, ragged], write_indices, kv_lengths int64 [batch] and, where given,
            force_active.{l} bool [batch, ragged] (False at padding: nobody needs its MLP). `ragged` is the most real
            tokens any sequence has in the step, at least 1; `write_indices` + `ragged` fit the cache in every row.
        real: bool [batch, sequence]: which of the tokens `Runner.step` got are fed: no padding.
        counts: int64 [batch]: how many those are.
    """

    feeds: Mapping[str, np.ndarray]
    real: BoolArray
    counts: Int64Array

    @property
    def batch(self) -> int:
        """How many sequences it feeds."""
        return int(self.real.shape[0])

    @property
    def ragged(self) -> int:
        """Tokens per sequence as the graph sees them, its padding counted."""
        return int(self.feeds[names.INPUT_IDS].shape[1])

    def restored(self, values: NDArray[Element]) -> NDArray[Element]:
        """Puts what was computed per token back to where the tokens were.

        Args:
            values: [batch, ragged, …].

        Returns:
            [batch, sequence, …], 0 at padding.
        """
        moved = np.zeros((*self.real.shape, *values.shape[2:]), values.dtype)
        moved[self.real] = values[_filled(self.counts, self.ragged)]
        return moved

    def last(self, values: NDArray[Element]) -> NDArray[Element]:
        """What was computed for each sequence's last real token of the step.

        Args:
            values: [batch, ragged, …], or [batch, 1, …] where the graph kept the last real token's only.

        Returns:
            [batch, 1, …], 0 where the step is all padding to a sequence.
        """
        columns = np.maximum(self.counts - 1, 0) if values.shape[1] > 1 else np.zeros_like(self.counts)
        rows = values[np.arange(self.batch), columns]
        rows[self.counts == 0] = 0
        return rows[:, np.newaxis]


class StaticCache:
    """How much of a static cache is taken, and by which tokens.

    Args:
        name: Of the runner, for messages.
        limits: How much fits.

    Attributes:
        limits: As given.
    """

    def __init__(self, name: str, limits: StaticCacheLimits) -> None:
        self.limits = limits
        self._name = name
        self._mask: BoolArray = np.zeros((0, 0), np.bool_)

    @property
    def past(self) -> int:
        """Tokens per sequence fed since `reset`, padding counted."""
        return int(self._mask.shape[1])

    def reset(self, batch: int) -> None:
        """Forgets all tokens.

        Args:
            batch: Sequences from now on.

        Raises:
            StepError: More than the largest profile has.
        """
        if self.limits.max_batch is not None and batch > self.limits.max_batch:
            raise StepError(
                f"{self._name}: got a batch of {batch}, expected at most {self.limits.max_batch}, the largest profile",
                hint=f"feed smaller batches, or export with --trt-max-batch {batch}",
            )
        self._mask = np.zeros((batch, 0), np.bool_)

    def next_steps(
        self,
        input_ids: Int64Array,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        force_active: Decisions | None = None,
    ) -> list[StaticCacheStep]:
        """Converts a step whose shapes `Runner.step` has checked; the cache stays as it is.

        Args:
            input_ids: As `Runner.step`.
            attention_mask: As `Runner.step`.
            position_ids: As `Runner.step`.
            force_active: As `Runner.step`.

        Returns:
            What to run, in order: one step, or several where a row's padding has no room behind its tokens.

        Raises:
            StepError: The step does not fit into the profiles or the cache, or the mask hides other cached tokens than
                when they were fed.
        """
        mask = attention_mask != 0
        real = mask[:, self.past :]
        counts = real.sum(1, dtype=np.int64)
        lengths = self._mask.sum(1, dtype=np.int64)
        ragged = max(int(counts.max()), 1)
        self._check(mask, lengths, counts)
        tokens: dict[str, np.ndarray] = {
            names.INPUT_IDS: input_ids.astype(np.int64),
            names.POSITION_IDS: position_ids.astype(np.int64),
        }
        for layer, decisions in (force_active or {}).items():
            tokens[names.force_active_name(layer)] = decisions.astype(np.bool_)
        numbers = real.cumsum(1) - 1  # of each token among its sequence's
        steps = []
        start = 0
        while start < ragged:
            held = lengths + np.minimum(counts, start)
            size = min(ragged - start, self._room(lengths, held))
            part = real & (start <= numbers) & (numbers < start + size)
            steps.append(self._step(tokens, part, held, size))
            start += size
        return steps

    def _room(self, lengths: Int64Array, held: Int64Array) -> int:
        """Columns that every row has slots for.

        Args:
            lengths: Tokens that each sequence had in the cache before the steps.
            held: Tokens that it has by now.
        """
        slots = self.limits.max_cache
        # Nobody reads a full sequence's slots any more, but those it was filled from if the step fails and is repeated.
        kept = np.where(held < slots, held, np.where(lengths < slots, lengths, 0))
        return int((slots - kept).min())

    def _step(self, tokens: Mapping[str, np.ndarray], part: BoolArray, held: Int64Array, size: int) -> StaticCacheStep:
        """Feeds a part of the tokens, in rows of `size`, behind those that are held."""
        counts = part.sum(1, dtype=np.int64)
        filled = _filled(counts, size)
        feeds = {name: _moved(values, part, filled) for name, values in tokens.items()}
        feeds[names.WRITE_INDICES] = np.minimum(held, self.limits.max_cache - size)
        feeds[names.KV_LENGTHS] = held + counts
        return StaticCacheStep(feeds, part, counts)

    def repeat(self, branches: int) -> None:
        """Makes so many equal sequences of one."""
        self._mask = np.repeat(self._mask, branches, 0)

    def append(self, steps: Sequence[StaticCacheStep]) -> None:
        """Counts the tokens of `next_steps` as cached, once all of them have run."""
        self._mask = np.concatenate([self._mask, np.any([step.real for step in steps], 0)], 1)

    def _check(self, mask: BoolArray, lengths: Int64Array, counts: Int64Array) -> None:
        """Collects everything that keeps the step from running."""
        problems, hints = [], []
        changed = np.flatnonzero((mask[:, : self.past] != self._mask).any(1))
        if changed.size:
            problems.append(
                f"attention_mask hides other cached tokens of sequences {changed.tolist()} than when they were fed, "
                "expected the same mask with the step's columns appended"
            )
            hints.append("reset, and feed the sequences again without the tokens to hide")
        limit, longest = self.limits.max_sequence, int(counts.max())
        if limit is not None and longest > limit:
            problems.append(
                f"the step has {longest} tokens per sequence, expected at most {limit}, the largest profile"
            )
            hints.append(f"feed the prompt in several steps, or export with --trt-max-sequence {longest}")
        row = int((lengths + counts).argmax())
        needed = int(lengths[row] + counts[row])
        if needed > self.limits.max_cache:
            problems.append(
                f"the cache is full: sequence {row} has {lengths[row]} tokens in it and the step adds {counts[row]}, "
                f"expected at most {self.limits.max_cache} together"
            )
            hints.append(f"generate fewer tokens, or export with {self.limits.cache_option} {needed} or more")
        if problems:
            raise StepError(f"{self._name}: {'; '.join(problems)}", hint="; ".join(hints))


def _filled(counts: Int64Array, ragged: int) -> BoolArray:
    """Where a right-ragged batch has tokens, bool [batch, ragged]."""
    return np.arange(ragged) < counts[:, np.newaxis]


def _moved(values: NDArray[Element], real: BoolArray, filled: BoolArray) -> NDArray[Element]:
    """Moves each row's real values to its left, in order; padding becomes 0 (token 0, position 0, not active)."""
    moved = np.zeros(filled.shape, values.dtype)
    moved[filled] = values[real]  # both go through the rows in order
    return moved
