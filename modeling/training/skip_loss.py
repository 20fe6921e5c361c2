"""How the tokens of a training step are labelled, and the routers' losses (DLO, arXiv 2407.11030).

Tokens of padding count nowhere: `counted` is bool [batch, sequence], False for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.utils.generic import maybe_autocast

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.routing import TrainingRouting, is_active
from dlo_export.modeling.training.selection import made_there, portion


@dataclass(frozen=True)
class RouterLosses:
    """What one micro-batch says about its routers.

    Attributes:
        skip: Mean cross entropy between scores and labels.
        rate: Squared distance of the rate that inference would have from the wanted one, with a straight-through
            gradient.
        labelled: int64 [routed layers]: by layer, in their order, how many tokens are labelled active.
        active: int64, 0-D: how many tokens inference would activate, of all routed layers together.
        selected: Likewise, how many were.
    """

    skip: torch.Tensor
    rate: torch.Tensor
    labelled: torch.Tensor
    active: torch.Tensor
    selected: torch.Tensor


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
        limits = made_there(by_layer, scores.dtype, scores.device).reshape(-1, 1, 1)
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
        (targets & counted).sum(dim=(1, 2)),
        ((hard > 0) & counted).sum(),
        selected.sum(),
    )


def _lowest(values: torch.Tensor, number: torch.Tensor, rate: float) -> torch.Tensor:
    """Of each row exactly ceil(number·rate) are chosen, among equals the first: identity layers are full of them.

    Args:
        values: [rows, candidates], as many in each row as are not to be chosen at infinity.
        number: int64, 0-D: of the others in a row.
        rate: See above.
    """
    order = values.argsort(dim=-1, stable=True)
    first = (torch.arange(values.shape[-1], device=values.device) < portion(number, rate)).expand_as(order)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, first)
