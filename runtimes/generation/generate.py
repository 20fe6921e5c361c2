"""Generate tokens on any runner, one step at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.generation.sampling import Sampler, Sampling
from dlo_export.runtimes.runner import Int64Array, Runner, StepResult

GREEDY = Sampling()

PREFILL_TOKENS = 256
"""Columns of a prompt fed at once. All at once, scores and mask grow with the square of the prompt."""


class GenerationError(RuntimeInputError):
    """There is nothing to continue."""


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What a generation took.

    Attributes:
        prompt_tokens: Of all sequences, padding not counted.
        new_tokens: Of all sequences, end tokens counted.
        prefill_seconds: Until the first new token of every sequence.
        decode_seconds: All steps after that.
        tokens_per_second: New tokens after each sequence's first, per second of decode; 0 where there were none.
        active_rate: By routed layer, share of the tokens fed that were active; empty where the runner does not expose
            the routers' scores.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    active_rate: dict[int, float]


class Generation:
    """One generation: iterate over it for the tokens of every step, then read `sequences` and `stats`.

    Args:
        runner: Reset first.
        prompts: Token ids, at least one per sequence; shorter ones are padded at the left.
        max_new_tokens: Per sequence.
        end_tokens: Any of them ends its sequence, and is its last token.
        pad_token: What padding is made of; it is masked.
        sampling: How tokens are chosen.
        prefill_tokens: The prompts are fed in steps of so many columns, or of as many as the runner takes.

    Raises:
        GenerationError: No prompts, an empty one, or no tokens to generate.
    """

    def __init__(
        self,
        runner: Runner,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_tokens: Collection[int] = (),
        pad_token: int = 0,
        sampling: Sampling = GREEDY,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts) or max_new_tokens < 1:
            raise GenerationError(
                f"generation: got prompts of {[len(prompt) for prompt in prompts]} tokens and max_new_tokens "
                f"{max_new_tokens}, expected at least one token in each prompt and one to generate",
                hint="start an empty prompt with the beginning-of-sequence token",
            )
        self._runner = runner
        self._max_new_tokens = max_new_tokens
        self._end_tokens = frozenset(end_tokens)
        self._pad_token = pad_token
        self._prefill_tokens = min(prefill_tokens, runner.max_step or prefill_tokens)
        self._sampler = Sampler(sampling, len(prompts))
        self._ids, self._mask = left_padded(prompts, pad_token)
        self._positions = np.maximum(self._mask.cumsum(-1) - 1, 0)
        self._seconds = [0.0, 0.0]  # prefill, decode
        self._active: dict[int, int] = {}
        self._routed_tokens = 0
        self._prompt_tokens = int(self._mask.sum())
        self.sequences: list[list[int]] = [[] for _ in prompts]

    def __iter__(self) -> Iterator[tuple[int | None, ...]]:
        """Yields the new token of every sequence, None where it has ended."""
        self._runner.reset(len(self.sequences))
        running = np.ones(len(self.sequences), bool)
        for step in range(self._max_new_tokens):
            start = time.perf_counter()
            result = self._feed(running)
            tokens = np.where(running, self._sampler(result.logits[:, -1]), self._pad_token)
            self._seconds[step > 0] += time.perf_counter() - start
            for row in np.flatnonzero(running):
                self.sequences[row].append(int(tokens[row]))
            yield tuple(int(token) if run else None for token, run in zip(tokens, running, strict=True))
            running = running & ~np.isin(tokens, list(self._end_tokens))
            if not running.any():
                return
            self._ids = tokens[:, np.newaxis]
            # An ended sequence goes on being fed padding; masked, so that its neighbours' shapes are all it affects.
            self._mask = np.concatenate([self._mask, running[:, np.newaxis].astype(np.int64)], 1)
            self._positions = self._positions[:, -1:] + 1

    @property
    def stats(self) -> GenerationStats:
        """Of the steps so far."""
        new_tokens = sum(len(sequence) for sequence in self.sequences)
        decoded = new_tokens - sum(1 for sequence in self.sequences if sequence)
        prefill, decode = self._seconds
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            new_tokens=new_tokens,
            prefill_seconds=prefill,
            decode_seconds=decode,
            tokens_per_second=decoded / decode if decode else 0.0,
            active_rate={layer: count / self._routed_tokens for layer, count in sorted(self._active.items())},
        )

    def _feed(self, running: np.ndarray) -> StepResult:
        """Feeds all that has not been fed, in steps of so many columns; returns the last one's result."""
        new, total = self._ids.shape[1], self._mask.shape[1]
        for start in range(0, new, self._prefill_tokens):
            columns, seen = slice(start, start + self._prefill_tokens), total - new + start + self._prefill_tokens
            mask = self._mask[:, :seen]
            result = self._runner.step(self._ids[:, columns], mask, self._positions[:, columns], last_logits=True)
            self._count_active(result, mask[:, total - new + start :].astype(bool) & running[:, np.newaxis])
        return result

    def _count_active(self, result: StepResult, real: np.ndarray) -> None:
        """Counts a step's active tokens among the real ones, bool [batch, sequence]."""
        for layer, active in self._runner.active(result.router_scores).items():
            self._active[layer] = self._active.get(layer, 0) + int((active & real).sum())
        self._routed_tokens += int(real.sum())


def generate(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    pad_token: int = 0,
    sampling: Sampling = GREEDY,
    prefill_tokens: int = PREFILL_TOKENS,
) -> Generation:
    """Runs a `Generation` to its end; arguments and errors are the same."""
    generation = Generation(
        runner,
        prompts,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens,
        pad_token=pad_token,
        sampling=sampling,
        prefill_tokens=prefill_tokens,
    )
    for _ in generation:
        pass
    return generation


def left_padded(sequences: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[Int64Array, Int64Array]:
    """One batch of sequences of unequal length.

    Args:
        sequences: Token ids.
        pad_token: What padding is made of.

    Returns:
        input_ids and attention_mask (0 at padding), int64 [batch, longest].
    """
    longest = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), longest), pad_token, np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
