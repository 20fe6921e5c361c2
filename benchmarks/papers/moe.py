"""Mixture-of-experts upcycling (arXiv 2212.05055), the baseline in width: every MLP becomes experts and a router.

In PyTorch only: nothing of it is exported.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM

_BALANCE_WEIGHT = 0.01  # Switch Transformers' (arXiv 2101.03961)
_ROUTER_DEVIATION = 0.02


def upcycle(model: LlamaDloForCausalLM, *, experts: int, chosen: int, renormalise: bool, seed: int) -> None:
    """Replaces every MLP by copies of itself of which each token runs some.

    Args:
        model: Dense; changed in place, and still trained and measured like any other.
        experts: Copies of each MLP.
        chosen: How many of them a token runs.
        renormalise: Let the chosen experts' weights add up to 1, which keeps the function; without it their sum is the
            share of the router's probability that fell on them.
        seed: Of the routers.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        layer.mlp = ExpertMlp(layer.mlp, model.config.hidden_size, experts, chosen, renormalise, generator)


class ExpertMlp(nn.Module):
    """Experts of which each token runs the likeliest, weighted by their probabilities.

    In training the gradient of the load-balancing loss, experts · Σ share of tokens · mean probability (arXiv
    2101.03961), is added to that of whatever else the router's probabilities lead to.
    """

    def __init__(
        self,
        mlp: nn.Module,
        hidden_size: int,
        experts: int,
        chosen: int,
        renormalise: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(experts))
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        nn.init.normal_(self.gate.weight, std=_ROUTER_DEVIATION, generator=generator)
        self._chosen = chosen
        self._renormalise = renormalise

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts, of the shape of the hidden states, [batch, sequence, hidden]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        with maybe_autocast(tokens.device.type, enabled=False):  # as every router's arithmetic, in fp32
            probabilities = torch.softmax(self.gate(tokens.float()), dim=-1)
            if self.training:
                probabilities = _with_gradient_of(probabilities, self._balance_loss)
            weights, indices = probabilities.topk(self._chosen, dim=-1)
            if self._renormalise:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        added = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            rows, places = (indices == number).nonzero(as_tuple=True)
            branch = expert(tokens.index_select(0, rows)).float() * weights[rows, places].unsqueeze(-1)
            added = added.index_add(0, rows, branch)
        return added.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _balance_loss(self, probabilities: torch.Tensor) -> torch.Tensor:
        chosen = probabilities.topk(self._chosen, dim=-1).indices
        experts = len(self.experts)
        shares = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        return _BALANCE_WEIGHT * experts * (shares * probabilities.mean(dim=0)).sum()


def _with_gradient_of(values: torch.Tensor, loss: Any) -> torch.Tensor:
    """The values, whose gradient will be that of a loss of theirs besides their own.

    So a loss that belongs to a layer reaches training without a way for it through the whole model.
    """
    if not values.requires_grad:
        return values
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    added: torch.Tensor = _AddGradient.apply(values, gradient)
    return added


class _AddGradient(torch.autograd.Function):
    """The identity, adding a constant to the gradient."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(gradient)
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *outer: torch.Tensor) -> Any:
        (gradient,) = context.saved_tensors
        return outer[0] + gradient, None
