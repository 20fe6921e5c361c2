"""RMSNorm in float64: transformers' own computes in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


class Float64RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, all in float64 (arXiv 1910.07467).

    Args:
        norm: Whose weight and ε it takes over.
    """

    def __init__(self, norm: LlamaRMSNorm | Olmo2RMSNorm | Qwen3RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon = float(norm.variance_epsilon)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalises float64 [..., hidden]."""
        mean_of_squares = hidden_states.square().mean(-1, keepdim=True)
        normed: torch.Tensor = hidden_states * torch.rsqrt(mean_of_squares + self.epsilon) * self.weight
        return normed


def use_float64_norms(model: nn.Module) -> None:
    """Replaces every norm of a float64 model, in place; its parameters keep their names."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (LlamaRMSNorm, Olmo2RMSNorm, Qwen3RMSNorm)):
                setattr(module, name, Float64RMSNorm(child))
