"""genai_config.json, so that onnxruntime-genai runs an artefact as it is."""

from __future__ import annotations

from typing import Any

from dlo_export.checkpoints import interface as names
from dlo_export.checkpoints.config import LlamaConfig


def genai_config(config: LlamaConfig, num_layers: int) -> dict[str, Any]:
    """The file's content.

    Args:
        config: Of the base model.
        num_layers: Of the deepened model.

    Returns:
        `past_present_share_buffer` is false because standard Attention grows its cache; `position_ids` is declared
        because the graph computes its rotary tables from it (onnxruntime-genai 0.18).
    """
    eos: int | list[int] | None = list(config.eos_token_id)
    if len(config.eos_token_id) == 1:
        eos = config.eos_token_id[0]
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_id or (0,))[0]
    return {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": num_layers,
                "inputs": {
                    "input_ids": names.INPUT_IDS,
                    "attention_mask": names.ATTENTION_MASK,
                    "position_ids": names.POSITION_IDS,
                    "past_key_names": names.past_name("%d", "key"),
                    "past_value_names": names.past_name("%d", "value"),
                },
                "outputs": {
                    "logits": names.LOGITS,
                    "present_key_names": names.present_name("%d", "key"),
                    "present_value_names": names.present_name("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
        },
    }
