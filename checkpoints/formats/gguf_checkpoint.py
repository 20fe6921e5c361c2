"""Llama checkpoints in a GGUF file: its metadata and tensors under Hugging Face names, forms and orders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.checkpoints.config import LlamaConfig, RopeConfig
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.gguf_file import GgufTensor
from dlo_export.checkpoints.formats.gguf_parts import read_gguf_parts
from dlo_export.checkpoints.formats.gguf_tokenizer import (
    GgufTokenizer,
    end_token_ids,
    has_tokenizer,
    special_token_id,
)
from dlo_export.checkpoints.llama_checkpoint import Checkpoint
from dlo_export.checkpoints.tokenization.errors import UnknownTokenizerError

ROPE_FACTORS = "rope_freqs.weight"
GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# config.json key ← metadata key below "llama."; only what a file says is passed on.
CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of a Llama model.

    Its `stored_dtype` is the block format of most of its bytes ("Q4_1"), or a float type's name. A tokenizer of an
    unknown kind is left out, with a warning.

    Args:
        path: The file, or any part of one that was split.

    Raises:
        CheckpointError: It is damaged, in parts that are not all there, or not a supported Llama.
    """
    files, contents = read_gguf_parts(path)
    metadata, stored = contents.metadata, dict(contents.tensors)
    factors = stored.pop(ROPE_FACTORS, None)
    sizes: dict[str, int] = defaultdict(int)
    for tensor in stored.values():
        sizes[tensor.stored_type] += tensor.stored_nbytes
    stored_type = max(sizes, key=lambda name: sizes[name], default="F32")
    values = _config_values(metadata, stored, path)
    values["torch_dtype"] = DTYPES.get(stored_type, "float32")
    config = LlamaConfig.from_dict(values, origin=str(path))
    if factors is not None:
        values["rope_scaling"] = _llama3_scaling(factors, config, path)
        config = LlamaConfig.from_dict(values, origin=str(path))
    tokenizer, warnings = _tokenizer(metadata, config, path)
    renamed = _renamed(stored, config)
    return Checkpoint(
        path,
        config,
        {**renamed, **_absent_biases(renamed, config, files[0])},
        stored_dtype=DTYPES.get(stored_type, stored_type),
        files=files,
        save_tokenizer=tokenizer.save if tokenizer else lambda _: None,
        warnings=warnings,
    )


def _tokenizer(
    metadata: Mapping[str, Any], config: LlamaConfig, path: Path
) -> tuple[GgufTokenizer | None, Sequence[str]]:
    """The file's tokenizer, if it has one of a known kind, and what to warn of."""
    if not has_tokenizer(metadata):
        return None, ()
    try:
        tokenizer = GgufTokenizer(metadata, path)
    except UnknownTokenizerError as err:
        return None, (f"{err}: no tokenizer is written, copy the original model's tokenizer.json to what is",)
    if len(tokenizer.tokens) > config.vocab_size:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens has {len(tokenizer.tokens)} tokens, the model {config.vocab_size}",
            hint="the tokenizer belongs to another model: export the original Hugging Face checkpoint instead",
        )
    return tokenizer, tokenizer.warnings


def _config_values(metadata: Mapping[str, Any], stored: Mapping[str, GgufTensor], path: Path) -> dict[str, Any]:
    """config.json as transformers 4 would write it, which 5 reads as well."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}, expected 'llama'",
            hint="only Llama and the DLO authors' Llama variants can be exported",
        )
    unsupported = [
        f"llama.{key} is {metadata[f'llama.{key}']!r}, expected {expected}"
        for key, expected in (
            ("expert_count", 0),
            ("attention.value_length", metadata.get("llama.attention.key_length")),
        )
        if metadata.get(f"llama.{key}", expected) != expected
    ]
    if unsupported:
        raise CheckpointError(f"{path}: not a model this version can export\n  " + "\n  ".join(unsupported))
    values: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    for name, key in CONFIG_KEYS.items():
        if f"llama.{key}" in metadata:
            values[name] = metadata[f"llama.{key}"]
    if "vocab_size" not in values and "token_embd.weight" in stored:
        values["vocab_size"] = stored["token_embd.weight"].shape[0]
    values["bos_token_id"] = special_token_id(metadata, "bos")
    ends = end_token_ids(metadata)
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    values["pad_token_id"] = special_token_id(metadata, "padding")
    # llama.cpp writes the head only where it is not the embedding matrix.
    values["tie_word_embeddings"] = "output.weight" not in stored
    values["attention_bias"] = any(re.fullmatch(r"blk\.\d+\.attn_\w+\.bias", name) for name in stored)
    values["mlp_bias"] = any(re.fullmatch(r"blk\.\d+\.ffn_\w+\.bias", name) for name in stored)
    values["sliding_window"] = metadata.get("llama.attention.sliding_window")
    values["rope_scaling"] = _rope_scaling(metadata)
    rotated = metadata.get("llama.rope.dimension_count")
    head_dim = values.get("head_dim", _quotient(values.get("hidden_size"), values.get("num_attention_heads")))
    if rotated is not None and rotated != head_dim:
        values["partial_rotary_factor"] = f"{rotated} of {head_dim}"
    return {name: value for name, value in values.items() if value is not None or name.endswith("token_id")}


def _quotient(total: Any, parts: Any) -> int | None:
    return total // parts if type(total) is int and type(parts) is int and parts > 0 else None


def _rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type")
    factor = metadata.get("llama.rope.scaling.factor")
    if kind is None and "llama.rope.scale_linear" in metadata:  # files of 2023
        kind, factor = "linear", metadata["llama.rope.scale_linear"]
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return None
    return {"rope_type": kind, "factor": factor}


def _llama3_scaling(factors: GgufTensor, config: LlamaConfig, path: Path) -> dict[str, Any]:
    """The rule behind the divisors of the frequencies that llama.cpp stores for Llama 3.1 and later.

    All published models differ in the factor alone, which is the largest divisor. Any others are refused: config.json
    and the reference have no place for a table.
    """
    if config.rope.kind != "default" or factors.shape != (config.head_dim // 2,):
        raise CheckpointError(f"{path}: {ROPE_FACTORS} {list(factors.shape)} does not fit rope.{config.rope.kind}")
    rule = RopeConfig(
        "llama3",
        config.rope.theta,
        factor=float(np.max(factors.numpy(), initial=1.0)),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    plain = replace(rule, kind="default").inverse_frequencies(config.head_dim)
    divisors = plain / rule.inverse_frequencies(config.head_dim)
    if not np.allclose(factors.numpy(), divisors):
        raise CheckpointError(
            f"{path}: the frequency divisors in {ROPE_FACTORS} do not follow the rule of Llama 3.1",
            hint="export the original Hugging Face checkpoint, whose config.json holds the rule",
        )
    return {
        "rope_type": rule.kind,
        "factor": rule.factor,
        "low_freq_factor": rule.low_freq_factor,
        "high_freq_factor": rule.high_freq_factor,
        "original_max_position_embeddings": rule.original_max_position,
    }


def _renamed(stored: Mapping[str, GgufTensor], config: LlamaConfig) -> dict[str, GgufTensor]:
    """The tensors under Hugging Face names; names that have none are kept, for Checkpoint to complain about."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors = {}
    for name, tensor in stored.items():
        of_layer = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name)
        stem, _, suffix = name.rpartition(".")
        new_name, order = name, None
        if of_layer and of_layer[2] in LAYER_NAMES:
            layer, role, suffix = of_layer.groups()
            new_name = f"model.layers.{layer}.{LAYER_NAMES[role]}.{suffix}"
            if role in heads and tensor.shape[0] == heads[role] * config.head_dim:
                order = _half_split_order(heads[role], config.head_dim)
        elif stem in GLOBAL_NAMES:
            new_name = f"{GLOBAL_NAMES[stem]}.{suffix}"
        tensors[new_name] = replace(tensor, name=new_name, row_order=order)
    return tensors


@dataclass(frozen=True)
class _ZeroBias:
    """A bias the file leaves out where its neighbours have one. See `CheckpointTensor`."""

    name: str
    shape: tuple[int, ...]
    file: MappedFile

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        return np.zeros(self.shape, self.dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.numpy()[start:stop]

    def release(self) -> None:
        """Nothing is held."""


def _absent_biases(tensors: Mapping[str, GgufTensor], config: LlamaConfig, file: MappedFile) -> dict[str, _ZeroBias]:
    """Zeros for the biases that no layer has, where others do: a Hugging Face Llama has all of a block's, or none.

    Models with biases of q, k and v alone are common. A bias that some layers have is expected in all of them.
    """
    roles = {name.split(".", 3)[3] for name in tensors if name.startswith("model.layers.") and name.endswith(".bias")}
    return {
        name: _ZeroBias(name, shape, file)
        for name, shape in config.tensor_shapes().items()
        if name.endswith(".bias") and name.split(".", 3)[3] not in roles
    }


def _half_split_order(heads: int, head_dim: int) -> np.ndarray:
    """Stored row of each row of q or k, int64 [heads · head_dim].

    llama.cpp rotates neighbouring rows of a head together, transformers row i and row i + head_dim / 2.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
