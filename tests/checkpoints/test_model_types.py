"""Types that are read as Llamas, held against transformers' own classes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
FULL = ["full_attention"] * 3
MINISTRAL = {"model_type": "ministral", "sliding_window": 64}
QWEN2 = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
TOKENS = 24

# Whatever else these say, no window is in force.
FULL_ATTENTION = {
    "mistral": {"sliding_window": None, "num_key_value_heads": 2, "head_dim": 12},
    "mistral with defaults": {"sliding_window": None, "rope_theta": 1e6},
    "mistral with a window as long as the context": {"sliding_window": 128},
    "mistral with a Llama's keys": {"sliding_window": None, "attention_bias": True, "mlp_bias": True},
    # transformers 5.23 cannot run this class without the number, which no layer uses.
    "ministral": {"sliding_window": 4, "layer_types": FULL, "head_dim": 8, "tie_word_embeddings": True},
}


def save_model(folder: Path, case: str) -> torch.nn.Module:
    """Saves a random model of transformers' own class; its config.json says no more than the case does."""
    torch.manual_seed(0)
    values = TINY | FULL_ATTENTION[case]
    model_type = case.split(maxsplit=1)[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
    return model


@pytest.mark.parametrize("case", FULL_ATTENTION)
def test_model_computes_what_its_own_class_does_when_read_as_a_llama(tmp_path: Path, case: str) -> None:
    model = save_model(tmp_path, case)
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS)
    with open_checkpoint(tmp_path) as checkpoint, torch.no_grad():
        assert checkpoint.config.model_type == case.split(maxsplit=1)[0]
        llama = llama_dlo_from_tensors(checkpoint.config.model_values(), checkpoint.tensors)
        torch.testing.assert_close(llama(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        # What is written of it is a Llama's, for readers that take defaults from the type.
        raw = LlamaConfig.from_dict(checkpoint.config.raw)
    assert raw.model_type == "llama"
    assert raw.model_values() == checkpoint.config.model_values()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8, expected full attention"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, expected full attention"),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            "sliding_window is 4096, as mistral takes it to be unless it is null",
        ),
        # Its class does not read the switch that Qwen2's and others' have.
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False}, "sliding_window is 8"),
        (
            {"model_type": "ministral", "max_position_embeddings": 8192},
            "sliding_window is 4096, as ministral takes it to be",
        ),
        ({"layer_types": [*FULL[1:], "sliding_attention"], **MINISTRAL}, "layer_types is .*for every"),
        ({"layer_types": FULL[1:], **MINISTRAL}, "layer_types is .*expected 'full_attention' for every"),
        ({"layer_types": "full_attention", **MINISTRAL}, "layer_types is 'full_attention'"),
        ({"max_window_layers": 2, **QWEN2}, "sliding_window is 8, expected full attention"),
        ({"layer_types": [*FULL[1:], "sliding_attention"], **QWEN2}, "layer_types is .*for every layer"),
        # Of this family, and not Llama's arithmetic: queries are scaled by their position.
        ({"model_type": "ministral3"}, "model_type is 'ministral3', expected one of"),
    ],
)
def test_config_is_refused_by_name_when_a_window_is_in_force(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_dict(TINY | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": FULL},
    ],
)
def test_config_is_read_when_no_layer_of_a_qwen_has_a_window_in_force(keys: dict[str, Any]) -> None:
    config = LlamaConfig.from_dict(TINY | {"model_type": "qwen2", "num_key_value_heads": 2} | keys)
    # What is written says nothing of windows that readers could take another way.
    assert not config.raw.keys() & {"sliding_window", "layer_types", "max_window_layers"}
    assert LlamaConfig.from_dict(config.raw).model_values() == config.model_values()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3", "granite", "olmo2"])
def test_config_has_its_own_classs_defaults_when_keys_are_left_out(model_type: str) -> None:
    values = {key: value for key, value in TINY.items() if key != "max_position_embeddings"} | {
        "num_attention_heads": 32,
        "hidden_size": 128,
        "vocab_size": 200_000,
    }
    config, own = LlamaConfig.from_dict(values | {"model_type": model_type}), AutoConfig.for_model(model_type, **values)
    assert config.num_kv_heads == own.num_key_value_heads
    assert config.head_dim == getattr(own, "head_dim", 4)
    assert config.rope.theta == own.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == own.max_position_embeddings
    assert config.tie_word_embeddings == own.tie_word_embeddings
    assert (config.bos_token_id, config.pad_token_id) == (own.bos_token_id, own.pad_token_id)
    assert config.eos_token_id == (() if own.eos_token_id is None else (own.eos_token_id,))
    rotated = [layer not in config.layers_without_rope for layer in range(3)]
    assert rotated == list(map(bool, getattr(own, "no_rope_layers", [1] * 3)))
    if config.family.has_multipliers:
        assert config.multipliers.values() == {key: getattr(own, key) for key in config.multipliers.values()}
