"""Writes tiny random models of families other than Llama, and Llamas of rarer ropes, by transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.checkpoints.model_types import RoutingKind, family_of
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer
from tests.tiny_models import ROPES as LLAMA_ROPES

LAYERS = 4
ORIGINAL_CONTEXT = 16
"""Tokens after which the ropes below change."""

_SIZES = {
    "vocab_size": BYTE_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "attention_bias": True},
    "smollm3": {"no_rope_layer_interval": 2, "mlp_bias": True},
    "granite": {
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "olmo2": {"attention_bias": True},
}
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
    "yarn with options": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.2,
            "mscale_all_dim": 0.8,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
    },
    "llama3": {"rope_parameters": LLAMA_ROPES["llama3"]},
    "linear": {"rope_parameters": LLAMA_ROPES["linear"], "max_position_embeddings": 64},
}


def save_tiny_family(folder: Path, model_type: str, **values: Any) -> PreTrainedModel:
    """Writes a checkpoint with a tokenizer of bytes, and returns transformers' model of it.

    Args:
        folder: Created.
        model_type: Of transformers.
        values: Of config.json, beside those of `FAMILIES`.
    """
    values = _SIZES | FAMILIES.get(model_type, {}) | json.loads(json.dumps(values))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.3 if parameter.ndim > 1 else 0.2, generator=generator)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder, BYTE_VOCABULARY)
    return model


def route_tiny_family(folder: Path, routing: RoutingKind) -> None:
    """Gives a saved model routers that let about half of the tokens through, in every layer but the second."""
    config = json.loads((folder / "config.json").read_text())
    is_dlo = [layer != 1 for layer in range(LAYERS)]
    rule = {"rescale": True, "scale_factor": 1.5, "scale_gap": 0.4}
    config |= routed_config(is_dlo, routing=routing, family=family_of(config), **rule)
    (folder / "config.json").write_text(json.dumps(config))
    rng, hidden = np.random.default_rng(1), config["hidden_size"]
    routers = {
        f"model.routers.{layer}.weight": torch.from_numpy(rng.standard_normal((1, hidden)).astype(np.float32))
        for layer, routed in enumerate(is_dlo)
        if routed
    }
    save_file(load_file(folder / "model.safetensors") | routers, folder / "model.safetensors", {"format": "pt"})
