"""What is computed for some tokens of a step only: gathered, or for all of them with the others' results discarded."""

from __future__ import annotations

import abc

import torch


class TokenRows(abc.ABC):
    """The tokens of a step that something is computed for, as rows [n, …] of functions that know single tokens.

    Args:
        active: bool [batch, sequence]; the others keep what they have.
    """

    def __init__(self, active: torch.Tensor) -> None:
        self._active = active

    @abc.abstractmethod
    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Rows [n, …] of values [batch, sequence, …]."""

    @abc.abstractmethod
    def put(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The values [batch, sequence, width] with active tokens' rows in their places."""

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as [batch, sequence, width], with zeros at tokens that are not active."""
        return self.put(rows, rows.new_zeros(*self._active.shape, rows.shape[-1]))


class ActiveTokens(TokenRows):
    """The active tokens and no others: really skips."""

    def __init__(self, active: torch.Tensor) -> None:
        super().__init__(active)
        self._indices = active.reshape(-1).nonzero().squeeze(-1)
        self._all = self._indices.numel() == active.numel()

    def gather(self, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        tokens = values.flatten(0, 1)
        return tokens if self._all else tokens.index_select(0, self._indices)

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        if self._all:
            return rows.reshape(values.shape)
        return values.flatten(0, 1).index_copy(0, self._indices, rows).reshape(values.shape)


class MaskedTokens(TokenRows):
    """Every token, what is computed for those that are not active being discarded: exact, saves nothing."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return values.flatten(0, 1)

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        # Not a sum of products: times 0, a skipped token's infinities would come through as NaN.
        return torch.where(self._active.unsqueeze(-1), rows.reshape(values.shape), values)


class EveryToken(TokenRows):
    """All tokens, without asking which: nothing waits for a GPU, and shapes do not depend on data."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return values.flatten(0, 1)

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return rows.reshape(values.shape)


def every_token(hidden_states: torch.Tensor) -> TokenRows:
    """All tokens of [batch, sequence, hidden]."""
    return EveryToken(torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device))
