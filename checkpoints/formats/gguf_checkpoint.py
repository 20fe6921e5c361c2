"""Checkpoints in a GGUF file: its metadata and tensors under Hugging Face names, forms and orders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.checkpoints.config import LlamaConfig, RopeConfig
from dlo_export.checkpoints.dtypes import FLOAT32
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.gguf_parts import read_gguf_parts
from dlo_export.checkpoints.formats.gguf_tensor import FLOAT_TYPES, GgufTensor
from dlo_export.checkpoints.formats.gguf_tokenizer import (
    GgufTokenizer,
    end_token_ids,
    has_tokenizer,
    special_token_id,
)
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_checkpoint import Checkpoint
from dlo_export.checkpoints.llama_layer import GGUF_OUTER_NAMES, LAYER_NUMBER, layer_tensor_name, parse_layer_tensor
from dlo_export.checkpoints.model_types import GGUF_FAMILIES
from dlo_export.checkpoints.tokenization.errors import UnknownTokenizerError

ROPE_FACTORS = "rope_freqs.weight"
# config.json key ← metadata key below the architecture's name; only what a file says is passed on.
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

# The same for rope_scaling: the first of all kinds, the others of yarn.
ROPE_KEYS = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# What a file may say of its model besides, and what says nothing; with anything else it is a model of other arithmetic.
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
    "logit_scale": (1.0, 0.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (1.0, 0.0),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    # Converters write the whole factor, as config.json has it, and llama.cpp takes it for one on top of YaRN's own.
    "rope.scaling.yarn_attn_factor": (),
}
# What llama.cpp reads of every model; what config.json takes for a missing one may be another number.
REQUIRED_KEYS = ("context_length", "attention.layer_norm_rms_epsilon")


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of a Llama, or of a family whose files are read.

    Its `stored_dtype` is the block format of most of its bytes ("Q4_1"), or a float type's name. A tokenizer of an
    unknown kind is left out, with a warning.

    Args:
        path: The file, or any part of one that was split.

    Raises:
        CheckpointError: It is damaged, in parts that are not all there, or not a supported model.
    """
    files, contents = read_gguf_parts(path)
    metadata, stored = contents.metadata, dict(contents.tensors)
    factors = stored.pop(ROPE_FACTORS, None)
    sizes: dict[str, int] = defaultdict(int)
    for tensor in stored.values():
        sizes[tensor.stored_type] += tensor.stored_nbytes
    stored_type = max(sizes, key=lambda name: sizes[name], default="F32")
    values = _config_values(metadata, stored, path)
    values["torch_dtype"] = FLOAT_TYPES.get(stored_type, FLOAT32).name
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
        stored_dtype=FLOAT_TYPES[stored_type].name if stored_type in FLOAT_TYPES else stored_type,
        kind="gguf",
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
        return None, (
            f"{err}: no tokenizer is written, put the original model's tokenizer.json into the output folder",
        )
    if len(tokenizer.tokens) > config.vocab_size:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens has {len(tokenizer.tokens)} tokens, the model {config.vocab_size}",
            hint="the tokenizer belongs to another model: export the original Hugging Face checkpoint instead",
        )
    return tokenizer, tokenizer.warnings


def _config_values(metadata: Mapping[str, Any], stored: Mapping[str, GgufTensor], path: Path) -> dict[str, Any]:
    """config.json as transformers 4 would write it, which 5 reads as well."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}, expected one of {', '.join(GGUF_FAMILIES)}",
            hint="export the original Hugging Face checkpoint, if its family is one of docs/checkpoints.md",
        )
    family = GGUF_FAMILIES[architecture]
    keys = {name.removeprefix(f"{architecture}."): value for name, value in metadata.items()}
    # What llama.cpp takes for these where they are missing; config.json's types have other defaults.
    heads = keys.get("attention.head_count")
    head_dim = keys.get("attention.key_length", _quotient(keys.get("embedding_length"), heads))
    sizes = {"attention.value_length": (head_dim,), "attention.scale": (*_usual_scale(head_dim), 0.0)}
    unsupported = [
        f"{architecture}.{key} is {keys[key]!r}, expected {expected[0] if expected else 'none'}"
        for key, expected in {**NEUTRAL_VALUES, **sizes}.items()
        if key in keys and keys[key] not in expected
    ]
    unsupported += [f"{architecture}.{key} is missing" for key in REQUIRED_KEYS if key not in keys]
    if unsupported:
        raise CheckpointError(
            f"{path}: not a model this version can export\n  " + "\n  ".join(unsupported),
            hint="docs/checkpoints.md lists what can be exported",
        )
    values: dict[str, Any] = {
        "architectures": [f"{family.prefix}ForCausalLM"],
        "model_type": family.name,
        "hidden_act": "silu",
    }
    values |= {name: keys[key] for name, key in CONFIG_KEYS.items() if key in keys}
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", head_dim)
    if "vocab_size" not in values and "token_embd.weight" in stored:
        values["vocab_size"] = stored["token_embd.weight"].shape[0]
    values["bos_token_id"] = special_token_id(metadata, "bos")
    ends = end_token_ids(metadata)
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    values["pad_token_id"] = special_token_id(metadata, "padding")
    # llama.cpp writes the head only where it is not the embedding matrix.
    values["tie_word_embeddings"] = "output.weight" not in stored
    # Where a family has biases of q, k and v alone, its type says so.
    values["attention_bias"] = not family.qkv_bias and _has_biases(stored, "attn")
    values["mlp_bias"] = _has_biases(stored, "ffn")
    if (window := keys.get("attention.sliding_window")) is not None:
        values |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    values["rope_scaling"] = _rope_scaling(keys)
    rotated = keys.get("rope.dimension_count")
    if rotated is not None and rotated != values["head_dim"]:
        values["partial_rotary_factor"] = f"{rotated} of {values['head_dim']}"
    return {name: value for name, value in values.items() if value is not None or name.endswith("token_id")}


def _has_biases(stored: Mapping[str, GgufTensor], block: str) -> bool:
    return any(re.fullmatch(rf"blk\.{LAYER_NUMBER}\.{block}_\w+\.bias", name) for name in stored)


def _quotient(total: Any, parts: Any) -> int | None:
    return total // parts if type(total) is int and type(parts) is int and parts > 0 else None


def _usual_scale(head_dim: Any) -> tuple[float, ...]:
    """What attention scores are multiplied by, as the header's float32 reads; nothing where the size is none."""
    return (float(str(np.float32(head_dim**-0.5))),) if type(head_dim) is int and head_dim > 0 else ()


def _rope_scaling(keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.json's rope_scaling; what is missing is what llama.cpp takes for it: linear, by one."""
    kind = keys.get("rope.scaling.type", "linear")
    # The second is what files of 2023 call it.
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    factor = 1.0 if factor == 0 else factor
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    values = {"rope_type": kind, "factor": factor}
    return values | {name: keys[key] for name, key in ROPE_KEYS.items() if key in keys}


def _llama3_scaling(factors: GgufTensor, config: LlamaConfig, path: Path) -> dict[str, Any]:
    """The rule behind the divisors of the frequencies that llama.cpp stores for Llama 3.1 and later.

    All published models differ in the factor alone, which is the largest divisor. Any others are refused: config.json
    and the reference have no place for a table.
    """
    if config.rope.kind != "default" or factors.shape != (config.head_dim // 2,):
        raise CheckpointError(
            f"{path}: {ROPE_FACTORS} {list(factors.shape)} does not fit rope.{config.rope.kind}",
            hint="export the original Hugging Face checkpoint, whose config.json holds the rule",
        )
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
    modules = {module.gguf: module for module in config.family.layer}
    heads = {"query": config.num_heads, "key-value": config.num_kv_heads}
    paired = config.family.gguf_rows == "paired"
    tensors = {}
    for name, tensor in stored.items():
        of_layer = re.fullmatch(rf"blk\.{LAYER_NUMBER}\.(\w+)\.(weight|bias)", name)
        module = modules.get(of_layer[2]) if of_layer else None
        if of_layer is None or module is None:
            tensors[GGUF_OUTER_NAMES.get(name, name)] = tensor
            continue
        order = None
        if paired and module.rotated and tensor.shape[0] == heads[module.axes[0]] * config.head_dim:
            order = _half_split_order(heads[module.axes[0]], config.head_dim)
        new_name = layer_tensor_name(int(of_layer[1]), f"{module.path}.{of_layer[3]}")
        tensors[new_name] = replace(tensor, row_order=order)
    return tensors


@dataclass(frozen=True)
class _ZeroBias(ArrayTensor):
    """A bias that a file leaves out.

    Attributes:
        file: The one that has none.
    """

    file: MappedFile


def _absent_biases(tensors: Mapping[str, GgufTensor], config: LlamaConfig, file: MappedFile) -> dict[str, _ZeroBias]:
    """Zeros for the biases that no layer has, where others do: a Hugging Face Llama has all of a block's, or none.

    Models with biases of q, k and v alone are common. A bias that some layers have is expected in all of them.
    """
    stored = {parsed.tensor for parsed in map(parse_layer_tensor, tensors) if parsed}
    absent = {module.bias_name for module in config.family.layer if module.bias} - stored
    return {
        name: _ZeroBias(np.zeros(shape, np.float32), file)
        for name, shape in config.tensor_shapes().items()
        for parsed in [parse_layer_tensor(name)]
        if parsed is not None and parsed.tensor in absent
    }


def _half_split_order(heads: int, head_dim: int) -> np.ndarray:
    """Stored row of each row of q or k, int64 [heads · head_dim].

    llama.cpp rotates neighbouring rows of a head together, transformers row i and row i + head_dim / 2.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
