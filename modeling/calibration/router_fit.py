"""Fits one router: a bias-free linear map of the residual stream that tells active tokens from skipped ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_RIDGE = 1e-2
"""Penalty on the router, in units in which every direction of the residual stream has variance 1."""
_ITERATIONS = 40
_BISECTIONS = 40


def fit_router(inputs: torch.Tensor, active: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Fits a router by regularised logistic regression, then shifts it to let through as many tokens as are labelled.

    A bias-free router's decision does not depend on a token's length, so tokens are normalised: a few have residual
    streams a hundred times longer than the others and would be all that a raw fit sees. The stream is whitened, so that
    the penalty treats its directions alike and the optimiser needs tens of iterations. What plays the part of the
    missing bias is the direction in which all tokens look the same.

    Args:
        inputs: The layer's input, float32 [tokens, hidden].
        active: Labels, bool [tokens]; both values occur.
        weights: How much each token counts, float32 [tokens].

    Returns:
        The router, float32 [hidden]: a token is active iff its product with the router is positive. Logits of tokens of
        median length are those of the regression.
    """
    lengths = inputs.norm(dim=-1, keepdim=True)
    root = inputs.shape[-1] ** 0.5
    tokens = inputs / lengths.clamp(min=torch.finfo(inputs.dtype).tiny) * root
    covariance = tokens.T @ tokens / len(tokens)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), device=covariance.device)
    triangle = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(triangle, tokens.T, upper=False).T
    solution = _logistic_regression(white, active.float(), weights / weights.mean())
    router: torch.Tensor = torch.linalg.solve_triangular(triangle.T, solution.unsqueeze(-1), upper=True).squeeze(-1)
    constant = torch.cholesky_solve(tokens.mean(dim=0).unsqueeze(-1), triangle).squeeze(-1)
    router += _shift(tokens @ router, tokens @ constant, int(active.sum())) * constant
    router *= root / lengths.median()
    return router


def _logistic_regression(rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Minimises the weighted mean cross entropy plus ridge, by L-BFGS."""
    solution = torch.zeros(rows.shape[-1], device=rows.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([solution], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        losses = F.binary_cross_entropy_with_logits(rows @ solution, targets, reduction="none")
        loss = (weights * losses).mean() + 0.5 * _RIDGE * solution.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return solution.detach()


def _shift(logits: torch.Tensor, constant: torch.Tensor, count: int) -> float:
    """How much of the constant direction to add for exactly so many positive logits, as near as ties allow."""
    low, high = -1.0, 1.0
    while ((logits + high * constant) > 0).sum() < count and high < 1e6:
        high *= 2
    while ((logits + low * constant) > 0).sum() > count and low > -1e6:
        low *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if ((logits + middle * constant) > 0).sum() < count:
            low = middle
        else:
            high = middle
    return high
