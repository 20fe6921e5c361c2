"""Which tokens a training step activates: in each layer by its scores, or softly by gates.

Tokens of padding count nowhere: `counted` is bool [batch, sequence], False for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.routing import GateTokens, SelectTokens, is_active
from dlo_export.modeling.training.settings import TrainingSettings

_SATURATED = 1e-6  # scores so near to 0 or 1 are at the end of their gate whatever the temperature


def training_routing(
    settings: TrainingSettings,
    step: int,
    capacities: Mapping[int, float],
    thresholds: Mapping[int, float],
    counted: torch.Tensor,
) -> dict[str, Any]:
    """What a model is to be told of how a step of training routes; nothing where nothing is routed.

    Args:
        settings: Of the run.
        step: Steps done.
        capacities: By routed layer, the share of tokens to select.
        thresholds: By layer, of inference, where it is not one half.
        counted: See above.

    Returns:
        Keyword arguments of `LlamaDloModel.forward`.
    """
    if not capacities:
        return {}
    if settings.selection == "top-k":
        return {"select_tokens": top_k_selection(capacities, counted)}
    select = threshold_selection(capacities, thresholds)
    if settings.selection == "threshold":
        return {"select_tokens": select}
    gates = annealed_gates(capacities, thresholds, settings.temperature(step), counted.device)
    return {"select_tokens": select, "gate_tokens": gates}


@dataclass(frozen=True)
class TopKSelection:
    """Activates a number of the highest scores, ties included.

    The number is a tensor: it changes from step to step, and a compiled layer is compiled for all numbers at once.

    Attributes:
        counted: See above.
        wanted: int64, 0-D.
    """

    counted: torch.Tensor
    wanted: torch.Tensor

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool, of the scores' shape."""
        candidates = scores.masked_fill(~self.counted, -1.0).flatten()
        return scores >= candidates.sort(descending=True).values.gather(0, self.wanted.reshape(1) - 1)


def top_k_selection(capacities: Mapping[int, float], counted: torch.Tensor) -> dict[int, SelectTokens]:
    """Activates in each layer the ceil(N·capacity) tokens with the highest scores, at least one, ties included."""
    shares = made_there([min(1.0, share) for share in capacities.values()], torch.float64, counted.device)
    wanted = portion(counted.sum(), shares).clamp(min=1)
    return {layer: TopKSelection(counted, number) for layer, number in zip(capacities, wanted, strict=True)}


def threshold_selection(capacities: Mapping[int, float], thresholds: Mapping[int, float]) -> dict[int, SelectTokens]:
    """Activates in each layer what inference would, and what a router scores that has learned nothing yet.

    Args:
        capacities: By layer.
        thresholds: By layer, where it is not one half.
    """
    return {layer: ThresholdSelection(thresholds.get(layer, ONE_HALF)) for layer in capacities}


@dataclass(frozen=True)
class ThresholdSelection:
    """Activates what scores above a threshold.

    Attributes:
        threshold: Of inference.
    """

    threshold: float

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool, of the scores' shape."""
        # All-zero routers score exactly 0.5. Inference skips that; training would begin without any MLP.
        return is_active(scores, self.threshold) | (scores == ONE_HALF)


def annealed_gates(
    capacities: Mapping[int, float],
    thresholds: Mapping[int, float],
    temperature: float | None,
    device: torch.device | None = None,
) -> dict[int, GateTokens] | None:
    """Gates between 0 and 1 by how far a token's logit is above its layer's threshold; None where decisions are hard.

    A soft gate's gradient says what more or less of what a token would skip would do, where a step has none.

    Args:
        capacities: By layer.
        thresholds: By layer, where it is not one half.
        temperature: In logits; the lower, the harder. None for hard decisions.
        device: Of the scores.
    """
    if temperature is None:
        return None
    # A tensor: it changes from step to step, and a compiled layer is compiled for all of them at once.
    shared = torch.full((), temperature, device=device)
    return {layer: AnnealedGate(thresholds.get(layer, ONE_HALF), shared) for layer in capacities}


@dataclass(frozen=True)
class AnnealedGate:
    """A soft decision.

    Attributes:
        threshold: Where it is one half.
        temperature: In logits, 0-D.
    """

    threshold: float
    temperature: torch.Tensor

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """From 0 to 1, of the scores' shape."""
        above = torch.logit(scores, eps=_SATURATED) - math.log(self.threshold / (1 - self.threshold))
        return torch.sigmoid(above / self.temperature)


def made_there(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A vector of few numbers. Copied to a GPU, it would wait for all that this has to do, in the middle of a step."""
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])


def portion(number: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """ceil(number·share), int64; beyond the precision of the product, so that 10·0.9 is 9 and not 10."""
    return (number.double() * share - 1e-9).ceil().long()
