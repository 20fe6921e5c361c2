"""A routed layer's decision per token, and the MLP branch under it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class TokenRouter(nn.Linear):
    """Scores every token of a layer's input; bias-free, at least float32 whatever the model's dtype.

    In 16 bits the decision itself would change: a bfloat16 score of a logit up to 0.0078 rounds to 0.5, a skip.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores [batch, sequence] of hidden states [batch, sequence, hidden]: float32, or float64 where they are."""
        precision = torch.promote_types(hidden_states.dtype, torch.float32)
        return torch.sigmoid(F.linear(hidden_states.to(precision), self.weight.to(precision))).squeeze(-1)


def is_active(scores: torch.Tensor) -> torch.Tensor:
    """The decision: bool, of the scores' shape. A score of exactly 0.5 skips."""
    return scores > 0.5


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
    return tokens.index_add(0, indices, added).reshape(hidden_states.shape)
