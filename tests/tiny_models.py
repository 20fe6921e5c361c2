"""Writes tiny random Llama checkpoints to a folder, in the forms transformers and the DLO authors' code save them.

The same arguments always give the same bytes. transformers says which tensors and keys a model has, so that the
readers under test are not checked against themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0},
    # An original context of 16 puts some of the few frequencies into each of the three bands.
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
AUTHORS_CLASSES = {"llama_dlo_exattn": "LlamaDLOExAttnForCausalLM", "llama_dlo": "LlamaDLOForCausalLM"}
OUR_CLASSES = {"llama_dlo_attn": "LlamaDloAttentionForCausalLM"}
# Byte-level tokens and the three special ones of save_byte_tokenizer.
BYTE_VOCABULARY = 256 + 3


def save_tiny_llama(
    folder: Path,
    *,
    hidden: int = 32,
    intermediate: int = 56,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 97,
    tie: bool = False,
    rope: str = "default",
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    routed: Sequence[bool] | None = None,
    model_type: str = "llama_dlo_exattn",
    routing_kv: str | None = None,
    rescale: bool = True,
    scale_factor: float = 2.0,
    scale_gap: float = 0.05,
    thresholds: Mapping[int, float] | None = None,
    legacy_keys: bool = False,
    tokenizer: bool = False,
    seed: int = 0,
) -> Path:
    """Writes config.json, generation_config.json and the weights, and a tokenizer if asked for.

    Args:
        folder: Created if need be.
        hidden: Size of the residual stream.
        intermediate: Inner size of the MLPs.
        layers: Number of decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: None for hidden / heads.
        vocab: Number of tokens.
        tie: Whether the head is the embedding matrix.
        rope: A key of ROPES.
        attention_bias: Biases on q, k, v and o.
        mlp_bias: Biases on gate, up and down.
        dtype: "float32", "float16" or "bfloat16".
        shards: More than 1 writes that many files and their index.
        routed: One flag per layer; not None writes the form of the DLO authors' code (old rope keys included), with
            routers that let about half of the tokens through.
        model_type: Of a routed checkpoint: "llama_dlo_exattn" (mlp routing), "llama_dlo" (layer routing) or
            "llama_dlo_attn" (attention routing).
        routing_kv: Of a routed checkpoint: attention_routing_kv.
        rescale: Of a routed checkpoint: rescale_hidden_states.
        scale_factor: Of a routed checkpoint.
        scale_gap: Of a routed checkpoint.
        thresholds: Of a routed checkpoint: not None writes them, and the model type that has them.
        legacy_keys: Write rope_theta, rope_scaling and torch_dtype as transformers 4 did.
        tokenizer: Add a byte-level tokenizer with a chat template (needs vocab >= BYTE_VOCABULARY).
        seed: Of all weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tie,
        rope_parameters=dict(ROPES[rope]),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    tensors = _random_tensors(config, seed)
    values = config.to_dict()
    if legacy_keys or routed is not None:
        _use_legacy_keys(values)
    if routed is not None:
        assert len(routed) == layers
        values |= {
            "architectures": [(AUTHORS_CLASSES | OUR_CLASSES)[model_type]],
            "model_type": model_type,
            "is_dlo": list(routed),
            "rescale_hidden_states": rescale,
            "scale_factor": scale_factor,
            "scale_gap": scale_gap,
            "dlo_capacity": 0.7,
            "transformers_version": "4.40.1",
        }
        if routing_kv is not None:
            values["attention_routing_kv"] = routing_kv
        if thresholds is not None:
            values["model_type"] += "" if model_type in OUR_CLASSES else "_thresholds"
            values["router_thresholds"] = {str(layer): threshold for layer, threshold in thresholds.items()}
        tensors |= _random_routers(routed, hidden, seed)
    stored = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in tensors.items()}
    _save_json(folder / "config.json", values)
    _save_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _save_weights(folder, stored, shards)
    if tokenizer:
        save_byte_tokenizer(folder, vocab)
    return folder


def save_byte_tokenizer(folder: Path, vocab: int) -> None:
    """Writes a tokenizer of single bytes: <unk> 0, <s> 1, </s> 2, then one token per byte, then unused fillers."""
    assert vocab >= BYTE_VOCABULARY
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused{index}>" for index in range(vocab - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    _save_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
        },
    )


def _random_tensors(config: LlamaConfig, seed: int) -> dict[str, np.ndarray]:
    # Weights are drawn here, not by transformers: its initialisation (zero biases, norms of 1) would hide mistakes.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = 1.0 + 0.1 * noise
        elif name.endswith(".bias"):
            tensors[name] = 0.1 * noise
        elif name == "model.embed_tokens.weight":
            tensors[name] = noise
        else:
            tensors[name] = noise * np.float32(1.0 / np.sqrt(parameter.shape[-1]))
    return tensors


def _random_routers(routed: Sequence[bool], hidden: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    scale = np.float32(1.0 / np.sqrt(hidden))
    return {
        f"model.routers.{layer}.weight": scale * rng.standard_normal((1, hidden), dtype=np.float32)
        for layer, is_routed in enumerate(routed)
        if is_routed
    }


def _use_legacy_keys(values: dict[str, Any]) -> None:
    rope = dict(values.pop("rope_parameters"))
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["torch_dtype"] = values.pop("dtype")


def _save_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    file_of = {
        name: f"model-{index * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors"
        for index, name in enumerate(tensors)
    }
    for file in sorted(set(file_of.values())):
        shard = {name: tensor for name, tensor in tensors.items() if file_of[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    _save_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": file_of})


def _save_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
