"""Times a runtime's layers while it takes the same step again and again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.engines.gpu_subject import Phase
from dlo_export.runtimes.runner import Runner

WARM_UP, REPEATS = 5, 20


def repeat_step(
    runner: Runner,
    phase: Phase,
    active_share: float,
    *,
    prompt_tokens: int,
    vocab_size: int,
    forget: Callable[[], None],
    warm_up: int = WARM_UP,
    repeats: int = REPEATS,
) -> None:
    """Feeds one sequence: prefills of a prompt, or decode steps behind one.

    Args:
        runner: Takes decisions; its runtime notes the layers' durations.
        phase: What to repeat.
        active_share: Of all (token, routed layer) pairs; 0 or 1, so that there is nothing to draw.
        prompt_tokens: Of the prompt.
        vocab_size: To draw tokens from.
        forget: Drops what was noted, before the repeats that count.
        warm_up: Repeats before.
        repeats: Those that count.
    """
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, prompt_tokens + warm_up + repeats))

    def step(start: int, stop: int) -> None:
        decided = np.full((1, stop - start), bool(active_share))
        runner.step(
            tokens[:, start:stop],
            np.ones((1, stop), np.int64),
            np.arange(start, stop)[np.newaxis],
            force_active=dict.fromkeys(runner.routed_layers, decided),
            last_logits=True,
        )

    if phase == "decode":
        runner.reset(1)
        step(0, prompt_tokens)
    for index in range(warm_up + repeats):
        if index == warm_up:
            forget()
        if phase == "prefill":
            runner.reset(1)
            step(0, prompt_tokens)
        else:
            step(prompt_tokens + index, prompt_tokens + index + 1)
