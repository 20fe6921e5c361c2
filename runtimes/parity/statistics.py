"""What is measured between a reference's outputs and a candidate's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.runtimes.errors import RuntimeInputError
from dlo_export.runtimes.parity.tolerances import OwnError, Tolerance
from dlo_export.runtimes.runner import BoolArray, FloatArray, decisions


@dataclasses.dataclass(frozen=True)
class LogitStatistics:
    """Differences of logits, over real tokens (padding left out).

    Attributes:
        compared: Logits compared.
        mean: Mean absolute difference, relative to the mean peak; NaN where a value is not finite.
        largest: Largest absolute difference relative to its token's peak; NaN likewise.
        largest_absolute: Largest absolute difference; NaN likewise.
        row: Sequence of the token with the largest relative difference.
        position: Column of that token, padding and cache counted.
    """

    compared: int
    mean: float
    largest: float
    largest_absolute: float
    row: int
    position: int

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the candidate agrees; False where nothing was compared or a value is not finite."""
        return self.compared > 0 and self.mean <= tolerance.mean and self.largest <= tolerance.largest


@dataclasses.dataclass(frozen=True)
class ScoreStatistics:
    """Differences of routers' scores, over real tokens (padding left out), of the layers whose scores both show.

    Attributes:
        compared: Scores compared.
        mean: Mean absolute difference; NaN where a score is not a number, here and below.
        layer: The routed layer that is off most; -1 where nothing was compared.
        layer_median: Median absolute difference of its scores.
        largest: Largest absolute difference.
        not_shown: Routed layers of the reference whose scores the candidate does not show.
    """

    compared: int
    mean: float
    layer: int
    layer_median: float
    largest: float
    not_shown: tuple[int, ...]

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the candidate's routers score as the reference's; so they do where nothing could be compared."""
        return self.layer_median <= tolerance.score_layer and self.largest <= tolerance.score

    def off(self, tolerance: Tolerance) -> str:
        """By how much, in words, and what is allowed."""
        return (
            f"layer {self.layer} by median {self.layer_median:.1e} and the largest by {self.largest:.1e}, "
            f"{tolerance.score_layer:.0e} and {tolerance.score:.0e} are allowed"
        )


NO_SCORES = ScoreStatistics(0, 0.0, -1, 0.0, 0.0, ())
"""Where nothing is routed."""


@dataclasses.dataclass(frozen=True)
class Flip:
    """A token whose decision differs from the reference's.

    Attributes:
        layer: Routed layer.
        row: Sequence of the batch.
        position: Column of the token, padding and cache counted.
        reference_score: Of the reference's router.
        candidate_score: Of the candidate's.
        threshold: What the score of an active token exceeds.
    """

    layer: int
    row: int
    position: int
    reference_score: float
    candidate_score: float
    threshold: float = ONE_HALF

    @property
    def margin(self) -> float:
        """How far the reference was from deciding otherwise: |reference_score - threshold|."""
        return abs(self.reference_score - self.threshold)


def logit_statistics(reference: FloatArray, candidate: FloatArray, real: BoolArray) -> LogitStatistics:
    """Compares logits.

    Args:
        reference: float32 [batch, sequence, vocab].
        candidate: The same.
        real: bool [batch, sequence], False at padding.

    Raises:
        RuntimeInputError: The shapes differ.
    """
    if reference.shape != candidate.shape:
        raise RuntimeInputError(
            f"parity: the candidate's logits are {list(candidate.shape)}, the reference's {list(reference.shape)}",
            hint="they are different models",
        )
    rows, positions = np.nonzero(real)
    if not rows.size:
        return LogitStatistics(0, 0.0, 0.0, 0.0, 0, 0)
    finite = np.isfinite(reference[real] - candidate[real]).all(-1)
    if not finite.all():
        worst = int(np.argmin(finite))
        nan = float("nan")
        return LogitStatistics(rows.size * reference.shape[-1], nan, nan, nan, int(rows[worst]), int(positions[worst]))
    differences = np.abs(candidate[real] - reference[real])
    peaks = np.maximum(np.abs(reference[real]).max(-1), 1.0)
    relative = differences.max(-1) / peaks
    worst = int(relative.argmax())
    return LogitStatistics(
        differences.size,
        float(differences.mean(dtype=np.float64) / peaks.mean()),
        float(relative[worst]),
        float(differences.max()),
        int(rows[worst]),
        int(positions[worst]),
    )


def flips(
    reference: Mapping[int, FloatArray],
    candidate: Mapping[int, FloatArray],
    real: BoolArray,
    thresholds: Mapping[int, float] | None = None,
) -> Iterator[Flip]:
    """Decisions that differ, by layer, row and position.

    Args:
        reference: Scores by routed layer, float32 [batch, sequence].
        candidate: The same, of the layers that show. A score that is not a number counts as a skip.
        real: bool [batch, sequence], False at padding.
        thresholds: Of the reference, by layer, where it is not one half.
    """
    thresholds = thresholds or {}
    wanted_active, found_active = decisions(reference, thresholds), decisions(candidate, thresholds)
    for layer in sorted(reference.keys() & candidate.keys()):
        wanted, found, threshold = reference[layer], candidate[layer], thresholds.get(layer, ONE_HALF)
        for row, position in zip(*np.nonzero((wanted_active[layer] != found_active[layer]) & real), strict=True):
            place = int(row), int(position)
            yield Flip(layer, *place, float(wanted[place]), float(found[place]), threshold)


def own_error(
    exact_logits: FloatArray,
    logits: FloatArray,
    exact_scores: Mapping[int, FloatArray],
    scores: Mapping[int, FloatArray],
    real: BoolArray,
    compared: str,
) -> OwnError:
    """How far a model is from itself in higher precision, under the same decisions.

    Args:
        exact_logits: In higher precision, [batch, sequence, vocab].
        logits: In lower precision.
        exact_scores: By routed layer, [batch, sequence].
        scores: In lower precision.
        real: bool [batch, sequence], False at padding.
        compared: What with what, for reports.
    """
    statistics = logit_statistics(exact_logits, logits, real)
    off = score_statistics(exact_scores, scores, real)
    return OwnError(statistics.mean, statistics.largest, off.largest, off.mean, off.layer_median, compared)


def score_statistics(
    reference: Mapping[int, FloatArray], candidate: Mapping[int, FloatArray], real: BoolArray
) -> ScoreStatistics:
    """Compares the scores of routers.

    Args:
        reference: By routed layer, float32 [batch, sequence].
        candidate: The same, of the layers that show.
        real: bool [batch, sequence], False at padding.
    """
    shown = sorted(reference.keys() & candidate.keys())
    not_shown = tuple(sorted(reference.keys() - candidate.keys()))
    if not shown or not real.any():
        return dataclasses.replace(NO_SCORES, not_shown=not_shown)
    errors = np.stack([np.abs(candidate[layer] - reference[layer])[real] for layer in shown])
    medians = np.median(errors, 1)
    worst = int(medians.argmax())  # a NaN counts as the largest
    return ScoreStatistics(
        errors.size,
        float(errors.mean(dtype=np.float64)),
        shown[worst],
        float(medians[worst]),
        float(errors.max()),
        not_shown,
    )


def stream_errors(
    reference: Sequence[Mapping[int, FloatArray]],
    candidate: Sequence[Mapping[int, FloatArray]],
    real: Sequence[BoolArray],
) -> dict[int, float]:
    """How far residual streams are apart: by layer, the mean over real tokens of |difference| / |reference| (norms).

    Args:
        reference: Per step, by layer, float32 [batch, sequence, hidden].
        candidate: The same; layers it does not expose are left out.
        real: Per step, bool [batch, sequence].
    """
    errors = {}
    for layer in sorted(reference[0].keys() & candidate[0].keys()):
        wanted = np.concatenate([step[layer][mask] for step, mask in zip(reference, real, strict=True)])
        found = np.concatenate([step[layer][mask] for step, mask in zip(candidate, real, strict=True)])
        errors[layer] = float(relative_errors(wanted, found).mean())
    return errors


def relative_errors(reference: FloatArray, candidate: FloatArray) -> FloatArray:
    """How far tokens are apart, |difference| / |reference| (norms): float32 [tokens], of values [tokens, width]."""
    norms = np.maximum(np.linalg.norm(reference, axis=-1), np.finfo(np.float32).tiny)
    apart: FloatArray = np.linalg.norm(candidate - reference, axis=-1) / norms
    return apart


def first_diverging_layer(errors: Mapping[int, float], tolerance: Tolerance) -> int | None:
    """The first layer whose residual stream is off by more than rounding (or is not finite).

    Args:
        errors: Of `stream_errors`.
        tolerance: Its mean is for logits; streams of agreeing models stay below twice that.
    """
    return next((layer for layer in sorted(errors) if not errors[layer] <= 2 * tolerance.mean), None)
