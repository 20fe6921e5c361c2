"""Writes tiny GGUF files from tiny Hugging Face checkpoints, the way llama.cpp's converter lays them out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape, quants
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HALVED = ("qwen2", "qwen3")
# The gguf package reads these formats but cannot write them: their blocks are filled with random bytes.
UNWRITABLE = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
# What tokenizers come to different ends about.
TEXTS = (
    "Hello world",
    "  The quick brown fox, 12345 jumps; it's 3.14!\n",
    "naïve café — 日本語 🎉🎉",
    "def f(x):\n    return x**2\n\n\n\tend  ",
    "<|im_start|>user\nHi<|im_end|>\n",
    "don't CAN'T we'll",
    "",
)


def save_tiny_gguf(
    folder: Path,
    path: Path,
    quantisation: str = "F32",
    *,
    metadata: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    tokens: int = 0,
    extra: dict[str, np.ndarray] | None = None,
    left_out: Sequence[str] = (),
    tensors_per_part: int = 0,
) -> Path:
    """Writes a checkpoint of save_tiny_llama or save_tiny_family as GGUF.

    Args:
        folder: The checkpoint; a single file.
        path: The GGUF file.
        quantisation: Of the matrices; vectors are float32.
        metadata: Values that are added or replaced; None leaves a key out.
        tokenizer: `tokenizer.ggml.pre` of a tokenizer of bytes with few merges; "missing" writes no such key, None no
            tokenizer.
        tokens: Of the tokenizer; 0 takes as many as the checkpoint has.
        extra: float32 tensors that are added.
        left_out: GGUF names of tensors that are not written.
        tensors_per_part: Splits the file as llama.cpp does; 0 writes one file.

    Returns:
        The file, or the first of its parts.
    """
    config = json.loads((folder / "config.json").read_text())
    # Families that llama.cpp rotates as transformers does have a name of their own.
    architecture = config["model_type"] if config["model_type"] in HALVED else "llama"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    values = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
        f"{architecture}.rope.dimension_count": head_dim,
        f"{architecture}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        f"{architecture}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{architecture}.vocab_size": config["vocab_size"],
    } | (metadata or {})
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, tokens or config["vocab_size"])
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy()
        role = name.split(".")[-2]
        if role in heads and architecture == "llama":
            array = _neighbours_rotated(array, heads[role])
        if _gguf_name(name) not in left_out:
            _add_tensor(writer, _gguf_name(name), array, quantisation)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem)
    return f"blk.{match[1]}.{NAMES[match[2]]}.{suffix}" if match else f"{NAMES[stem]}.{suffix}"


def _neighbours_rotated(array: np.ndarray, heads: int) -> np.ndarray:
    # llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + head_dim / 2.
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape))


def _add_tensor(writer: GGUFWriter, name: str, array: np.ndarray, quantisation: str) -> None:
    if array.ndim == 1 or quantisation == "F32":
        writer.add_tensor(name, np.ascontiguousarray(array))
        return
    kind = GGMLQuantizationType[quantisation]
    if quantisation in UNWRITABLE:
        shape = quant_shape_to_byte_shape(array.shape, kind)
        # Bytes below 60 make small finite float16 scales wherever the block format has them.
        stored = np.random.default_rng(len(name)).integers(0, 60, shape, dtype=np.uint8)
    else:
        stored = quants.quantize(array, kind)
    writer.add_tensor(name, stored, raw_dtype=None if stored.dtype == np.float16 else kind)


def _add_tokenizer(writer: GGUFWriter, pre: str, vocab: int) -> None:
    tokens = ["<|bos|>", "<|eos|>", "<think>", *sorted(ByteLevel.alphabet())]
    merges = ["t h", "Ġ th", "Ġth e", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3"]
    tokens += [merge.replace(" ", "") for merge in merges] + ["hello"]
    tokens += [f"<|unused{index}|>" for index in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    if pre != "missing":
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, 4] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}")
