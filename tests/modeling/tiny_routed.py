"""Tiny random routed models in PyTorch, and what tests of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dlo_export.checkpoints.model_types import RoutingKind, kv_keys, routed_type
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM, model_class_of

TINY = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_model(routing: RoutingKind = "mlp", **changes: object) -> LlamaDloForCausalLM:
    """A random model with random routers, which a new model does not have."""
    torch.manual_seed(0)
    model_class = model_class_of(routed_type(routing))
    model = model_class(model_class.config_class(**{**TINY, "is_dlo": True, **kv_keys(routing), **changes})).eval()
    for router in model.model.routers.values():
        torch.nn.init.normal_(router.weight)
    return model


def decisions(scores: Mapping[int, torch.Tensor]) -> np.ndarray:
    """Bool [routed layers, batch, sequence]."""
    return np.stack([(scores[layer] > 0.5).numpy() for layer in sorted(scores)])


def padded(samples: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and positions, [samples, longest] each, of samples left-padded with a token like any other."""
    width = max(len(sample) for sample in samples)
    ids, mask = torch.full((len(samples), width), 7), torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, width - len(sample) :] = sample
        mask[row, width - len(sample) :] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)
