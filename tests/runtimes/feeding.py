"""Feeds token sequences to a runner: alone, token by token, left-padded."""

from __future__ import annotations

import numpy as np

from dlo_export.runtimes.runner import BoolArray, Int64Array, Runner, StepResult


def reference_samples(folder_data: np.lib.npyio.NpzFile) -> list[Int64Array]:
    """The three samples of the authors' expected.npz, each [1, tokens]."""
    return [folder_data[f"ids_{b}"] for b in range(3)]


def feed(
    runner: Runner,
    samples: list[Int64Array],
    cached: int = 0,
    *,
    force: dict[int, BoolArray] | None = None,
    **options: bool,
) -> tuple[list[StepResult], Int64Array]:
    """Feeds samples of unequal length, left-padded into one batch; the last `cached` columns one by one.

    Returns:
        The steps' results, and the attention mask [batch, longest].
    """
    longest = max(sample.shape[1] for sample in samples)
    ids = np.zeros((len(samples), longest), np.int64)
    mask, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, sample in enumerate(samples):
        start = longest - sample.shape[1]
        ids[row, start:], mask[row, start:], positions[row, start:] = sample[0], 1, np.arange(sample.shape[1])
    runner.reset(len(samples))
    spans = [(0, longest - cached)] + [(i, i + 1) for i in range(longest - cached, longest)]
    results = [
        runner.step(
            ids[:, a:b],
            mask[:, :b],
            positions[:, a:b],
            force_active=None if force is None else {layer: active[:, a:b] for layer, active in force.items()},
            **options,
        )
        for a, b in spans
    ]
    return results, mask


def joined_logits(results: list[StepResult]) -> np.ndarray:
    return np.concatenate([result.logits for result in results], 1)


def joined_scores(results: list[StepResult]) -> dict[int, np.ndarray]:
    return {layer: np.concatenate([r.router_scores[layer] for r in results], 1) for layer in results[0].router_scores}
