"""Which tokens a training step activates, how they are labelled, and the routers' losses (DLO, arXiv 2407.11030).

Tokens of padding count nowhere: `counted` is bool [batch, sequence], False for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils.generic import maybe_autocast

from dlo_export.modeling.routing import SelectTokens, TrainingRouting, is_active


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


def top_k_selection(capacities: Mapping[int, float], counted: torch.Tensor) -> SelectTokens:
    """Activates in each layer the ceil(N·capacity) tokens with the highest scores, at least one, ties included."""
    tokens = int(counted.sum())

    def select(layer: int, scores: torch.Tensor) -> torch.Tensor:
        wanted = max(1, math.ceil(tokens * min(1.0, capacities[layer])))
        candidates = scores.masked_fill(~counted, -1.0).flatten()
        lowest = candidates.kthvalue(candidates.numel() - wanted + 1).values
        return scores >= lowest

    return select


def threshold_selection(_layer: int, scores: torch.Tensor) -> torch.Tensor:
    """Activates what inference would."""
    return is_active(scores)


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
    similarities = {layer: values.similarity[counted] for layer, values in routing.items()}
    if kind == "cos-global":
        pooled = _lowest(torch.cat(list(similarities.values())), rate)
        chosen = dict(zip(similarities, pooled.split([len(values) for values in similarities.values()]), strict=True))
    else:
        chosen = {layer: _lowest(values, rate) for layer, values in similarities.items()}
    return {layer: torch.zeros_like(counted).masked_scatter(counted, labels) for layer, labels in chosen.items()}


def router_losses(
    routing: Mapping[int, TrainingRouting], labels: Mapping[int, torch.Tensor], counted: torch.Tensor, rate: float
) -> RouterLosses:
    """Losses of a micro-batch, and what there is to be reported.

    Args:
        routing: By layer.
        labels: Of the same layers.
        counted: See above.
        rate: Wanted share of active tokens.
    """
    scores = torch.stack([values.scores[counted] for values in routing.values()])
    targets = torch.stack([labels[layer][counted] for layer in routing])
    with maybe_autocast(scores.device.type, enabled=False):
        skip = F.binary_cross_entropy(scores, targets.to(scores.dtype))
        # Inference takes a step of the score. A penalty on the scores themselves leaves the steps where they are.
        hard = is_active(scores.detach()).to(scores.dtype)
        penalty = ((hard + scores - scores.detach()).mean() - rate).square()
    selected = torch.stack([values.active[counted] for values in routing.values()])
    return RouterLosses(
        skip,
        penalty,
        targets.double().mean(dim=1),
        hard.double().mean(),
        selected.double().mean(),
    )


def _lowest(values: torch.Tensor, rate: float) -> torch.Tensor:
    """Exactly ceil(count·rate) of the values are chosen, among equals the first: identity layers are full of them."""
    # Beyond the precision of the product, so that 10·0.9 is 9 and not 10.
    count = min(len(values), math.ceil(len(values) * rate - 1e-9))
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.argsort(stable=True)[:count]] = True
    return chosen
