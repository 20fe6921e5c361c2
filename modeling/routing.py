"""A routed layer's decision per token, and the MLP branch under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from dlo_export.checkpoints.router_thresholds import ONE_HALF

SelectTokens = Callable[[int, torch.Tensor], torch.Tensor]
"""Training's decision in place of the threshold's: of a layer and its scores, bool of the scores' shape."""

GateTokens = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""What training multiplies a routed branch by: of a layer, its scores with their gradient, and the decisions."""


class TrainingRouting(NamedTuple):
    """What a routed layer did in a training step, for the losses of its router. All [batch, sequence].

    Attributes:
        scores: float32, with gradient.
        active: bool, as selected.
        similarity: float32 without gradient: cosine of the residual stream before and after the whole, unscaled MLP
            branch (DLO, arXiv 2407.11030). Low where the MLP matters.
    """

    scores: torch.Tensor
    active: torch.Tensor
    similarity: torch.Tensor


class TokenRouter(nn.Linear):
    """Scores every token of a layer's input; bias-free, at least float32 whatever the model's dtype.

    In 16 bits the decision itself would change: a bfloat16 score of a logit up to 0.0078 rounds to 0.5, a skip.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores [batch, sequence] of hidden states [batch, sequence, hidden]: float32, or float64 where they are."""
        precision = torch.promote_types(hidden_states.dtype, torch.float32)
        # Autocast would take the product in its 16 bits, whatever the type of what is multiplied.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return torch.sigmoid(F.linear(hidden_states.to(precision), self.weight.to(precision))).squeeze(-1)


def is_active(scores: torch.Tensor, threshold: float = ONE_HALF) -> torch.Tensor:
    """The decision: bool, of the scores' shape. A score of exactly the threshold, a float32 number, skips."""
    return scores > threshold


def add_masked_branch(
    hidden_states: torch.Tensor,
    branch: Callable[[torch.Tensor], torch.Tensor],
    active: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Returns h + [active]·c·branch(h), computing the branch for every token: exact, saves nothing.

    Args:
        hidden_states: h, [batch, sequence, hidden].
        branch: Norm and MLP, a function of single tokens.
        active: bool [batch, sequence].
        scale: c, float32 [batch, sequence]; None where it is 1.
    """
    added = branch(hidden_states)
    if scale is not None:
        added = added * scale.unsqueeze(-1).to(added.dtype)
    # A product with 0 would let a skipped token's infinities through as NaN.
    return hidden_states + torch.where(active.unsqueeze(-1), added, torch.zeros_like(added))


def straight_through(_layer: int, scores: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """The decisions, with a gradient for the router: a `GateTokens`.

    The decision is a step, which has no gradient: its straight-through estimate is the score's, so that a router also
    learns from what the tokens it skips would have been given.
    """
    return active.to(scores.dtype) + (scores - scores.detach())


def add_trained_branch(
    hidden_states: torch.Tensor,
    branch: Callable[[torch.Tensor], torch.Tensor],
    gate: torch.Tensor,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns h + gate·c·branch(h), and what labels are made of: one run of the MLP serves both.

    With `straight_through` gates, the values are those of `add_masked_branch`.

    Args:
        hidden_states: h, [batch, sequence, hidden].
        branch: Norm and MLP, a function of single tokens.
        gate: float32 [batch, sequence], from 0 to 1, with a gradient for the router.
        scale: c, float32 [batch, sequence]; None where it is 1.

    Returns:
        The residual stream, and `TrainingRouting.similarity`.
    """
    added = branch(hidden_states)
    with torch.no_grad():
        similarity = torch.cosine_similarity(hidden_states.float(), hidden_states.float() + added.float(), dim=-1)
    weight = gate if scale is None else gate * scale
    return hidden_states + added * weight.unsqueeze(-1).to(added.dtype), similarity


def add_active_branch(
    hidden_states: torch.Tensor,
    branch: Callable[[torch.Tensor], torch.Tensor],
    active: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """The same as `add_masked_branch`, computing the branch for the active tokens only."""
    indices = active.reshape(-1).nonzero().squeeze(-1)
    if indices.numel() == 0:
        return hidden_states
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    added = branch(tokens if indices.numel() == tokens.shape[0] else tokens.index_select(0, indices))
    if scale is not None:
        added = added * scale.reshape(-1, 1).index_select(0, indices).to(added.dtype)
    # Under autocast the branch has 16 bits where the residual stream has 32.
    return tokens.index_add(0, indices, added.to(tokens.dtype)).reshape(hidden_states.shape)
