"""A routed layer's decision per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from dlo_export.checkpoints.router_thresholds import ONE_HALF

SelectTokens = Callable[[torch.Tensor], torch.Tensor]
"""Training's decision of a layer in place of the threshold's: of its scores, bool of their shape."""

GateTokens = Callable[[torch.Tensor], torch.Tensor]
"""Training's soft decision of a layer: of its scores with their gradient, from 0 to 1, of their shape."""


class TrainingRouting(NamedTuple):
    """What a routed layer did in a training step, for the losses of its router. All [batch, sequence].

    Attributes:
        scores: float32, with gradient.
        active: bool, as selected.
        similarity: float32 without gradient: cosine of the residual stream before and after what can be skipped,
            unscaled and computed for every token (DLO, arXiv 2407.11030). Low where that matters.
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


def is_active(scores: torch.Tensor, threshold: float | torch.Tensor = ONE_HALF) -> torch.Tensor:
    """The decision: bool, of the scores' shape. A score of exactly the threshold, a float32 number, skips."""
    return scores > threshold


def straight_through(
    computed: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, active: torch.Tensor
) -> torch.Tensor:
    """`computed` where a token is active, `kept` where not, with a gradient for the decision.

    The decision is a step, which has no gradient: its straight-through estimate is the score's, so that a router also
    learns from what the tokens that skip would have been given.

    Args:
        computed: What active tokens get, [batch, sequence, hidden].
        kept: What the others keep.
        scores: float32 [batch, sequence], with gradient.
        active: bool [batch, sequence].
    """
    chosen: torch.Tensor = _StraightThrough.apply(computed, kept, scores, active.unsqueeze(-1))
    return chosen


class _StraightThrough(torch.autograd.Function):
    """See `straight_through`.

    Written out, since a sum that is the choice and has the gradient goes over the stream four times instead of once, in
    every layer, and keeps two more of it for the backward pass.
    """

    @staticmethod
    def forward(
        context: Any, computed: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        context.save_for_backward(computed, kept, active)
        context.scores_dtype = scores.dtype
        return torch.where(active, computed, kept)

    @staticmethod
    def backward(context: Any, *outer: torch.Tensor) -> Any:
        computed, kept, active = context.saved_tensors
        (gradient,) = outer
        of_computed, of_kept = gradient.masked_fill(~active, 0), gradient.masked_fill(active, 0)
        of_scores = (gradient * (computed - kept)).sum(dim=-1).to(context.scores_dtype)
        return of_computed, of_kept, of_scores, None


def mixed(computed: torch.Tensor, kept: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`computed` and `kept` of every token, by a gate from 0 to 1: float32 [batch, sequence], with gradient."""
    return kept + gate.unsqueeze(-1).to(computed.dtype) * (computed - kept)
