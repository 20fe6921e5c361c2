"""A Llama in PyTorch with random weights, made on the device: plain, or with a router on every layer."""

from __future__ import annotations

from typing import Any

import torch

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.modeling.from_tensors import empty_llama_dlo
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **other: Any) -> Any:
    """Content of config.json of a plain Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        **other,
    }


TINY = llama(64, 136, 3, 4, 2, 199)
SIZES = {
    "1B": llama(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True),
    "8B": llama(4096, 14_336, 32, 32, 8, 128_256),
}
"""Shapes of Llama-3.2-1B and Llama-3.1-8B."""


def random_model(config: dict[str, Any], *, routed: bool, device: str, dtype: torch.dtype) -> LlamaDloForCausalLM:
    """A model with random weights, made on the device; the same on every call there.

    Args:
        config: Of a plain Llama.
        routed: Whether every layer has a router.
        device: Where.
        dtype: Of all parameters but the routers.
    """
    layers = config["num_hidden_layers"]
    config = {**config, **(routed_config([True] * layers) if routed else {})}
    shapes = LlamaConfig.from_dict(config, "random").tensor_shapes()
    model = empty_llama_dlo(config, shapes, dtype=dtype)
    # Names in order, routers last: routed or not, the other weights are the same.
    order = sorted(shapes, key=lambda name: (name.startswith("model.routers"), name))
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name in order:
        shape = shapes[name]
        kind = torch.float32 if name.startswith("model.routers") else dtype
        values = torch.empty(shape, dtype=kind, device=device)
        if len(shape) == 1:
            values.fill_(1.0)
        else:
            values.normal_(
                std=1.0 if "embed" in name and not model.config.tie_word_embeddings else shape[-1] ** -0.5,
                generator=generator,
            )
        tensors[name] = values
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb.to(device)
    return model
