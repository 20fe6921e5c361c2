"""Moves a routed model's active rate by its thresholds, without training anything.

A router has no bias, so its rate is what training or calibration left it at. Raising every layer's threshold by the
same number of logits skips those tokens next that the routers themselves hold to be the least worth their MLPs,
wherever in the model they are. Skipping more in one layer changes what the layers behind it score, so the shift is
found by running the model again until the rate is the one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from dlo_export.checkpoints.router_thresholds import ONE_HALF, float32_threshold, thresholds_json
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM

RunRouters = Callable[[], Mapping[int, torch.Tensor]]
"""Runs a model over text as at inference: by routed layer, the scores of all tokens that count, float32 [tokens]."""

_RUNS = 8
_CLOSE = 0.001
_LARGEST_SCORE = 1 - 2**-24  # of those below 1 in float32
_SMALLEST_SCORE = 2.0**-126
_SEQUENCES_AT_ONCE = 4


@dataclass(frozen=True)
class ThresholdShift:
    """What was found.

    Attributes:
        thresholds: By routed layer, where it is not one half.
        before: Mean active rate of the shifted layers before, on the text the shift was fitted on.
        after: The same afterwards; as near to what was asked as the scores allow.
    """

    thresholds: dict[int, float]
    before: float
    after: float


@torch.no_grad()
def shift_thresholds(
    model: LlamaDloForCausalLM, run: RunRouters, rate: float, layers: Collection[int] | None = None
) -> ThresholdShift:
    """Gives a model's layers thresholds under which a share of the tokens is active, and leaves them to it.

    Args:
        model: Routed; its configuration is changed.
        run: Runs this model.
        rate: Wanted, as the mean over the layers, from 0 to 1.
        layers: To shift; None for all that are routed.
    """
    layers = model.config.routed_layers if layers is None else layers
    starting = model.config.thresholds
    limits = {layer: _logit(starting.get(layer, ONE_HALF)) for layer in layers}
    best: tuple[float, dict[int, float], float] | None = None
    before = math.nan
    for number in range(_RUNS):
        scores = run()
        # How far each token is from its layer's decision, in logits: one shift moves all layers.
        margins = torch.cat([_logits(scores[layer]) - limits[layer] for layer in layers])
        found = float(margins.gt(0).double().mean())
        before = found if number == 0 else before
        if best is None or abs(found - rate) < best[0]:
            best = abs(found - rate), model.config.thresholds, found
        if best[0] <= _CLOSE:
            break
        shift = _between(margins, round(rate * len(margins)))
        thresholds = {layer: _threshold(limit + shift) for layer, limit in limits.items()}
        use_thresholds(model, starting | thresholds)
        limits = {layer: _logit(threshold) for layer, threshold in thresholds.items()}
    assert best is not None, "there was a run"
    use_thresholds(model, best[1])
    return ThresholdShift(model.config.thresholds, before, best[2])


def use_thresholds(model: LlamaDloForCausalLM, thresholds: Mapping[int, float]) -> None:
    """Lets a model decide by other thresholds: by routed layer, where it is not one half."""
    model.config.router_thresholds = thresholds_json(thresholds)


@torch.no_grad()
def sequence_scores(model: LlamaDloForCausalLM, sequences: torch.Tensor) -> dict[int, torch.Tensor]:
    """By routed layer, the scores of all tokens at inference, float32 [tokens].

    Args:
        model: In evaluation mode.
        sequences: int64 [sequences, length], without padding.
    """
    batches = [model.model(batch, use_cache=False).router_scores for batch in sequences.split(_SEQUENCES_AT_ONCE)]
    return {layer: torch.cat([batch[layer].flatten() for batch in batches]) for layer in batches[0]}


def _between(margins: torch.Tensor, active: int) -> float:
    """What exactly so many margins exceed, in the middle of the gap, so that rounding flips none; ties skip."""
    ordered = margins.sort().values
    skipped = len(ordered) - active
    if skipped == 0:
        return float(ordered[0]) - 1.0
    return float(ordered[skipped - 1] if active == 0 else (ordered[skipped - 1] + ordered[skipped]) / 2)


def _logits(scores: torch.Tensor) -> torch.Tensor:
    return torch.logit(scores.double().clamp(_SMALLEST_SCORE, _LARGEST_SCORE))


def _logit(threshold: float) -> float:
    return math.log(threshold / (1 - threshold))


def _threshold(logit: float) -> float:
    score = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    return float32_threshold(min(max(score, _SMALLEST_SCORE), _LARGEST_SCORE))
