"""Time prefill and decode of several runners against each other, in alternating blocks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.runner import BoolArray, Int64Array, Runner


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        batch: Sequences.
        prompt_tokens: Of the prefill.
        decode_tokens: Steps of one token behind it.
        rounds: Blocks of each runner; one is a prefill and the decode steps behind it.
        warm_up: Blocks of each runner before the first that counts.
        seed: Of forced decisions.

    Raises:
        RuntimeInputError: A number is below its least.
    """

    batch: int = 1
    prompt_tokens: int = 128
    decode_tokens: int = 32
    rounds: int = 7
    warm_up: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch": 1, "prompt_tokens": 1, "decode_tokens": 1, "rounds": 1, "warm_up": 0}
        problems = [
            f"{name} is {getattr(self, name)}, expected >= {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if problems:
            raise RuntimeInputError(f"bench: {'; '.join(problems)}", hint="time at least one block of one sequence")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A runner to time.

    Attributes:
        runner: Open. Runners that share a process must not spin (`allow_spinning=False`): waiting threads of one would
            slow down the others.
        token_ids: To feed, batch x (prompt + decode) of them; a text's, because routers were trained on text and decide
            about random tokens as they like.
        active_rate: Force random decisions with this share of active tokens in every step; None lets routers decide.
    """

    runner: Runner
    token_ids: Sequence[int]
    active_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds, one number per block.

    Attributes:
        prefill: Of the whole prompt, [rounds].
        decode: Of one step, the block's median, [rounds].
        active_rate: By routed layer, of all tokens fed; empty where scores do not show and nothing is forced.
    """

    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]
    active_rate: dict[int, float]

    def summary(self) -> dict[str, Any]:
        """For a JSON line: median, p10, p90 in seconds, and the active rate."""
        return {
            "prefill_seconds": spread(self.prefill),
            "decode_seconds": spread(self.decode),
            "active_rate": {str(layer): round(rate, 4) for layer, rate in self.active_rate.items()},
        }


def compare_speed(subjects: Sequence[Subject], workload: Workload) -> list[Timing]:
    """Times runners in alternating blocks, every second round in reverse order.

    Args:
        subjects: What to time.
        workload: What to feed.

    Returns:
        Of each subject, in order. Divide them block by block (`ratio`): a slow moment of the machine slows both.

    Raises:
        RuntimeInputError: A text is too short.
    """
    clocks = [_Clock(subject, workload) for subject in subjects]
    for clock in clocks:
        for _ in range(workload.warm_up):
            clock.block()
        clock.forget()
    for index in range(workload.rounds):
        for clock in clocks if index % 2 == 0 else reversed(clocks):
            clock.block()
    return [clock.timing() for clock in clocks]


def spread(values: NDArray[np.float64]) -> dict[str, float]:
    """Median, p10 and p90."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


def ratio(values: NDArray[np.float64], base: NDArray[np.float64]) -> dict[str, float]:
    """Median, p10 and p90 of values / base, block by block."""
    return spread(values / base)


class _Clock:
    """One subject's blocks."""

    def __init__(self, subject: Subject, workload: Workload) -> None:
        self._runner = subject.runner
        self._workload = workload
        self._active_rate = subject.active_rate
        self._rng = np.random.default_rng(workload.seed)
        self._tokens = _tokens(subject, workload)
        self.forget()

    def forget(self) -> None:
        """Drops what was measured: warm-up."""
        self._prefill: list[float] = []
        self._decode: list[float] = []
        self._active: dict[int, int] = {}
        self._fed = 0

    def block(self) -> None:
        """One prefill and the decode steps behind it."""
        prompt = self._workload.prompt_tokens
        self._runner.reset(self._workload.batch)
        self._prefill.append(self._step(0, prompt))
        steps = [self._step(prompt + i, prompt + i + 1) for i in range(self._workload.decode_tokens)]
        self._decode.append(float(np.median(steps)))

    def timing(self) -> Timing:
        """Of all blocks since `forget`."""
        rates = {layer: count / self._fed for layer, count in sorted(self._active.items())}
        return Timing(np.array(self._prefill), np.array(self._decode), rates)

    def _step(self, start: int, stop: int) -> float:
        ids = self._tokens[:, start:stop]
        mask = np.ones((ids.shape[0], stop), np.int64)
        positions = np.tile(np.arange(start, stop), (ids.shape[0], 1))
        forced = None if self._active_rate is None else self._decide(self._active_rate, ids.shape)
        begin = time.perf_counter()
        result = self._runner.step(ids, mask, positions, force_active=forced, last_logits=True)
        seconds = time.perf_counter() - begin
        self._fed += ids.size
        active = forced or self._runner.active(result.router_scores)
        for layer, decisions in active.items():
            self._active[layer] = self._active.get(layer, 0) + int(decisions.sum())
        return seconds

    def _decide(self, active_rate: float, shape: tuple[int, ...]) -> dict[int, BoolArray]:
        """Random decisions for one step, of exactly this rate: chance would add its own spread to the timing."""
        layers = self._runner.routed_layers
        decisions = np.zeros(len(layers) * shape[0] * shape[1], np.bool_)
        decisions[: round(active_rate * decisions.size)] = True
        self._rng.shuffle(decisions)
        return dict(zip(layers, decisions.reshape(len(layers), *shape), strict=True))


def _tokens(subject: Subject, workload: Workload) -> Int64Array:
    """Of all blocks, int64 [batch, prompt + decode]."""
    shape = (workload.batch, workload.prompt_tokens + workload.decode_tokens)
    needed = shape[0] * shape[1]
    if len(subject.token_ids) < needed:
        raise RuntimeInputError(
            f"bench: the text has {len(subject.token_ids)} tokens, expected at least {needed} "
            f"({workload.batch} x ({workload.prompt_tokens} + {workload.decode_tokens}))",
            hint="give a longer text, or time fewer tokens",
        )
    return np.array(subject.token_ids[:needed], np.int64).reshape(shape)
