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


@dataclass(frozen=True)
class FoundRate:
    """What one run has found.

    Attributes:
        rate: Mean active rate of the shifted layers.
        next_thresholds: By routed layer, where it is not one half: to try next if that rate is not near enough.
    """

    rate: float
    next_thresholds: dict[int, float]


@torch.no_grad()
def shift_thresholds(
    model: LlamaDloForCausalLM,
    run: RunRouters,
    rate: float,
    layers: Collection[int] | None = None,
    *,
    agreed: Callable[[FoundRate], FoundRate] = lambda found: found,
) -> ThresholdShift:
    """Gives a model's layers thresholds under which a share of the tokens is active, and leaves them to it.

    Args:
        model: Routed; its configuration is changed.
        run: Runs this model.
        rate: Wanted, as the mean over the layers, from 0 to 1.
        layers: To shift; None for all that are routed.
        agreed: Where several processes do this, what all of them take of what each has found: one that went on where
            the others stop, or with other thresholds, would part from them.
    """
    layers = model.config.routed_layers if layers is None else layers
    starting = model.config.thresholds
    limits = {layer: _logit(starting.get(layer, ONE_HALF)) for layer in layers}
    best: tuple[float, dict[int, float], float] | None = None
    before = math.nan
    search = _ShiftSearch()
    for number in range(_RUNS):
        scores = run()
        # How far each token is from its layer's decision, in logits: one shift moves all layers.
        margins = torch.cat([_logits(scores[layer]) - _logit(model.config.threshold(layer)) for layer in layers])
        shift = search.next_after(_between(margins, round(rate * len(margins))))
        shifted = {layer: _threshold(limit + shift) for layer, limit in limits.items()}
        found = agreed(FoundRate(int(margins.gt(0).sum()) / len(margins), starting | shifted))
        before = found.rate if number == 0 else before
        if best is None or abs(found.rate - rate) < best[0]:
            best = abs(found.rate - rate), model.config.thresholds, found.rate
        if best[0] <= _CLOSE:
            break
        use_thresholds(model, found.next_thresholds)
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


class _ShiftSearch:
    """Finds the shift that needs no further one.

    What a run's own scores ask for is right but for what it changes in the layers behind. Where that is little, each
    run asks for less than half of what the one before did, and is done as it asks. Where it is much, as of whole
    layers, that alone would go to and fro for ever: the next shift then lies between one that was too small and one
    that was too large, by regula falsi (Illinois' form, in which no end stays for ever).
    """

    def __init__(self) -> None:
        self._shift, self._further, self._settles = 0.0, math.inf, True
        self._ends: dict[bool, tuple[float, float]] = {}  # by whether it was too small: a shift, and what it asked for

    def next_after(self, further: float) -> float:
        """The shift to try next, where the scores under the last one ask to be shifted further by so much."""
        is_small = further > 0
        if is_small == (self._further > 0) and (other := self._ends.get(not is_small)) is not None:
            self._ends[not is_small] = other[0], other[1] / 2
        self._ends[is_small] = self._shift, further
        self._settles &= abs(further) < abs(self._further) / 2
        self._further = further
        if self._settles or len(self._ends) < 2:
            self._shift += further
        else:
            (low, above), (high, below) = self._ends[True], self._ends[False]
            self._shift = (low * below - high * above) / (below - above)
        return self._shift


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
