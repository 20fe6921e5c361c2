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
TOKENS = 24

# Whatever else these say, no window is in force.
FULL_ATTENTION = {
    "mistral": {"sliding_window": None, "num_key_value_heads": 2, "head_dim": 12},
    "mistral with defaults": {"sliding_window": None, "rope_theta": 1e6},
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
        ({"model_type": "mistral"}, "sliding_window is 4096, as mistral takes it to be unless it is null"),
        # Its class does not read the switch that Qwen2's and others' have.
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False}, "sliding_window is 8"),
        ({"model_type": "ministral"}, "sliding_window is 4096, as ministral takes it to be"),
        ({"model_type": "ministral", "layer_types": [*FULL[1:], "sliding_attention"]}, "layer_types is .*for every"),
        ({"model_type": "ministral", "layer_types": FULL[1:]}, "layer_types is .*expected 'full_attention' for every"),
        ({"model_type": "ministral", "layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        # Of this family, and not Llama's arithmetic: queries are scaled by their position.
        ({"model_type": "ministral3"}, "model_type is 'ministral3', expected one of"),
    ],
)
def test_config_is_refused_by_name_when_a_window_is_in_force(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_dict(TINY | keys)
