"""Likelihoods of tokens, and perplexity: the one place where they are computed, whatever ran the model.

A token's loss is a log-softmax in float32; whoever adds losses up does so in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

# A piece of logits that stays in a processor's cache while it is gone over several times. A GPU has no such cache, and
# waits for each piece to be launched: there a piece is what fits its memory beside a model.
_LOGITS_AT_ONCE = 1 << 21
_LOGITS_AT_ONCE_ON_GPU = 1 << 29
# Logits made from hidden states: enough tokens for an efficient product.
_MADE_AT_ONCE = 1 << 24


class TokenScores(NamedTuple):
    """How well tokens were foretold.

    Attributes:
        losses: Negative log-likelihood of each in nats, float64 [tokens].
        most_likely: Whether no other token was likelier, bool [tokens]; of equally likely ones the first counts.
    """

    losses: torch.Tensor
    most_likely: torch.Tensor


def perplexity(loss: float, tokens: int) -> float:
    """Exp of the mean loss.

    Args:
        loss: Negative log-likelihood, summed over the predicted tokens.
        tokens: How many those are.

    Returns:
        Infinity where it exceeds float64, as a mean loss of 710 does.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(loss / tokens))


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Scores tokens by the logits that foretell them.

    Args:
        logits: [tokens, vocabulary], of any floating type; taken as float32 (float64 stays).
        targets: int64 [tokens].
    """
    at_once = _LOGITS_AT_ONCE if logits.device.type == "cpu" else _LOGITS_AT_ONCE_ON_GPU
    return _joined(_piece_scores(*piece) for piece in _pieces(logits, targets, at_once, logits.shape[-1]))


def score_hidden_states(
    head: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> TokenScores:
    """Scores tokens by the normalised hidden states that foretell them.

    In pieces: logits of a large vocabulary are the largest tensor of a small model.

    Args:
        head: From hidden states to logits.
        hidden_states: [tokens, hidden].
        targets: int64 [tokens].
        vocab_size: Number of logits.
    """
    at_once = _MADE_AT_ONCE if hidden_states.device.type == "cpu" else _LOGITS_AT_ONCE_ON_GPU
    pieces = _pieces(hidden_states, targets, at_once, vocab_size)
    return _joined(score_tokens(head(rows), wanted) for rows, wanted in pieces)


def score_array(logits: np.ndarray, targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`score_tokens` of arrays.

    Args:
        logits: float32 [tokens, vocabulary].
        targets: int64 [tokens].
    """
    scores = score_tokens(torch.from_numpy(logits), torch.from_numpy(targets))
    return scores.losses.numpy(), scores.most_likely.numpy()


def _piece_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return TokenScores(losses.double(), logits.argmax(-1) == targets)


def _pieces(
    rows: torch.Tensor, targets: torch.Tensor, logits_at_once: int, vocab_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    at_once = max(1, logits_at_once // vocab_size)
    yield from zip(rows.split(at_once), targets.split(at_once), strict=True)


def _joined(pieces: Iterable[TokenScores]) -> TokenScores:
    losses, most_likely = zip(*pieces, strict=True)
    return TokenScores(torch.cat(losses), torch.cat(most_likely))
