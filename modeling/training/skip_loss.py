"""Which tokens a training step activates, how they are labelled, and the routers' losses (DLO, arXiv 2407.11030).

Tokens of padding count nowhere: `counted` is bool [batch, sequence], False for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.utils.generic import maybe_autocast

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.routing import GateTokens, SelectTokens, TrainingRouting, is_active

_SATURATED = 1e-6  # scores so near to 0 or 1 are at the end of their gate whatever the temperature


@dataclass(frozen=True)
class RouterLosses:
    """What one micro-batch says about its routers.

    Attributes:
        skip: Mean cross entropy between scores and labels.
        rate: Squared distance of the rate that inference would have from the wanted one, with a straight-through
            gradient.
        labelled: float64 [routed layers]: by layer, in their order, the share of tokens labelled active.
        active: The share of tokens inference would activate, over all routed layers.
        selected: The share that was.
    """

    skip: torch.Tensor
    rate: torch.Tensor
    labelled: torch.Tensor
    active: torch.Tensor
    selected: torch.Tensor


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
    shares = _made_there([min(1.0, share) for share in capacities.values()], torch.float64, counted.device)
    wanted = _portion(counted.sum(), shares).clamp(min=1)
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


def skip_labels(
    kind: str, routing: Mapping[int, TrainingRouting], counted: torch.Tensor, rate: float
) -> dict[int, torch.Tensor]:
    """Labels by layer, bool [batch, sequence]: True where a token should not skip.

    Args:
        kind: ``cos-global``: of all layers' tokens together, exactly the ceil(tokens·layers·rate) with the lowest
            similarities; ``cos``: of each layer's, the ceil(tokens·rate) lowest; ``self``: what was selected.
        routing: By layer.
        counted: See above.
        rate: The share to keep active.
    """
    if kind == "self":
        return {layer: values.active & counted for layer, values in routing.items()}
    similarity = torch.stack([values.similarity for values in routing.values()])
    pools = similarity.masked_fill(~counted, torch.inf).flatten(1)  # padding comes after every cosine
    tokens = counted.sum()
    if kind == "cos-global":
        pools, tokens = pools.reshape(1, -1), tokens * len(routing)
    labels = _lowest(pools, tokens, rate).view_as(similarity)
    return dict(zip(routing, labels, strict=True))


def router_losses(
    routing: Mapping[int, TrainingRouting],
    labels: Mapping[int, torch.Tensor],
    counted: torch.Tensor,
    rate: float,
    thresholds: Mapping[int, float] | None = None,
) -> RouterLosses:
    """Losses of a micro-batch, and what there is to be reported.

    Args:
        routing: By layer.
        labels: Of the same layers.
        counted: See above.
        rate: Wanted share of active tokens.
        thresholds: By layer, of inference, where it is not one half.
    """
    scores = torch.stack([values.scores for values in routing.values()])  # [layers, batch, sequence]
    targets = torch.stack([labels[layer] for layer in routing])
    selected = torch.stack([values.active for values in routing.values()]) & counted
    tokens = counted.sum()
    every = tokens * len(routing)
    limits: float | torch.Tensor = ONE_HALF
    if thresholds:
        by_layer = [thresholds.get(layer, ONE_HALF) for layer in routing]
        limits = _made_there(by_layer, scores.dtype, scores.device).reshape(-1, 1, 1)
    with maybe_autocast(scores.device.type, enabled=False):
        # Not F.binary_cross_entropy: a score that is no number stops the process there, on a GPU without a word.
        likelihood = torch.where(targets, scores, 1 - scores).clamp(min=torch.finfo(scores.dtype).tiny)
        skip = -(likelihood.log() * counted).sum() / every
        # Inference takes a step of the score. A penalty on the scores themselves leaves the steps where they are.
        hard = is_active(scores.detach(), limits).to(scores.dtype)
        penalty = (((hard + scores - scores.detach()) * counted).sum() / every - rate).square()
    return RouterLosses(
        skip,
        penalty,
        (targets & counted).sum(dim=(1, 2)).double() / tokens,
        (hard * counted).sum().double() / every,
        selected.sum().double() / every,
    )


def _made_there(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A vector of few numbers. Copied to a GPU, it would wait for all that this has to do, in the middle of a step."""
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])


def _portion(number: torch.Tensor, share: torch.Tensor | float) -> torch.Tensor:
    """ceil(number·share), int64; beyond the precision of the product, so that 10·0.9 is 9 and not 10."""
    return (number.double() * share - 1e-9).ceil().long()


def _lowest(values: torch.Tensor, number: torch.Tensor, rate: float) -> torch.Tensor:
    """Of each row exactly ceil(number·rate) are chosen, among equals the first: identity layers are full of them.

    Args:
        values: [rows, candidates], as many in each row as are not to be chosen at infinity.
        number: int64, 0-D: of the others in a row.
        rate: See above.
    """
    order = values.argsort(dim=-1, stable=True)
    first = (torch.arange(values.shape[-1], device=values.device) < _portion(number, rate)).expand_as(order)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, first)
