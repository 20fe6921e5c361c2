"""Which tokens may skip a layer (its MLP, or all of it): labels by the similarity of the stream before and after.

DLO labels a token active where its similarity is low, either per layer (``cos``) or over all layers together
(``cos-global``), and exactly a given share of them (arXiv 2407.11030; the authors' code).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

LABELS = ("cos-global", "cos")

_MASSIVE = 3.0
"""A token this many times longer than the median one has a massive activation (arXiv 2402.17762)."""
_MASSIVE_WEIGHT = 100.0
_MAX_WEIGHT = 1_000.0


def is_massive(inputs: torch.Tensor) -> torch.Tensor:
    """Tokens whose residual stream is dominated by massive activations, bool [tokens].

    They are what attention rests on, and a few huge entries make their cosine 1 whatever the MLP does to the rest:
    similarity says nothing about them, and skipping them is what costs most.

    Args:
        inputs: A layer's input, [tokens, hidden].
    """
    lengths: torch.Tensor = inputs.float().norm(dim=-1)
    return lengths.gt(_MASSIVE * lengths.median())


def protected_similarity(similarity: torch.Tensor, massive: torch.Tensor) -> torch.Tensor:
    """Similarities by which tokens are ranked: massive tokens come last in the order of skipping. Both [tokens]."""
    return similarity.masked_fill(massive, -1.0)


def label_rates(similarities: Mapping[int, torch.Tensor], labels: str, skipped_layers: float) -> dict[int, float]:
    """For every layer, the share of its tokens that are labelled active.

    Args:
        similarities: By layer, float32 [tokens], the same tokens everywhere.
        labels: ``cos-global``: the tokens with the highest similarities of all layers are skipped; ``cos``: as many
            tokens in every layer.
        skipped_layers: How much is skipped, in layers: 3.0 skips as much as three layers have to skip.
    """
    kept = 1 - skipped_layers / len(similarities)
    if labels == "cos":
        return dict.fromkeys(similarities, kept)
    pooled = torch.cat(list(similarities.values()))
    threshold = pooled.kthvalue(max(1, math.ceil(len(pooled) * kept))).values
    return {layer: float((values <= threshold).float().mean()) for layer, values in similarities.items()}


def lowest(similarity: torch.Tensor, rate: float) -> torch.Tensor:
    """Labels of one layer, bool [tokens]: the given share of lowest similarities is active."""
    count = min(len(similarity), math.ceil(len(similarity) * rate))
    active = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    active[similarity.argsort()[:count]] = True
    return active


def label_weights(active: torch.Tensor, relative_size: torch.Tensor, massive: torch.Tensor) -> torch.Tensor:
    """How much each label counts in the fit: the squared size of what a wrong skip would leave out.

    Sizes count relative to those of the tokens that are to be skipped. Without this, the one token in hundreds whose
    massive activation this very MLP makes would be a rounding error of the fit, and losing it ruins the sequence.

    Args:
        active: Labels, bool [tokens].
        relative_size: Length of what is added over that of the stream, float32 [tokens].
        massive: bool [tokens].

    Returns:
        float32 [tokens], 1 for skipped tokens.
    """
    typical = relative_size[~active].median()
    weights = (relative_size / typical).square().clamp(1.0, _MAX_WEIGHT)
    weights = torch.where(massive, torch.full_like(weights, _MASSIVE_WEIGHT), weights)
    return torch.where(active, weights, torch.ones_like(weights))
