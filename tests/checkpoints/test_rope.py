"""Rotary frequencies are transformers', but for the last bits."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dlo_export.checkpoints.files.json_fields import JsonFields
from dlo_export.checkpoints.rope import RopeConfig, rope_of_fields
from tests.tiny_families import ROPES as LONG_ROPES
from tests.tiny_models import ROPES


@pytest.mark.parametrize("kind", sorted(ROPES))
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_are_those_of_transformers(kind, head_dim):
    values = ROPES[kind]
    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(values), max_position_embeddings=128)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    rope = RopeConfig(
        kind,
        values["rope_theta"],
        factor=values.get("factor", 1.0),
        low_freq_factor=values.get("low_freq_factor", 1.0),
        high_freq_factor=values.get("high_freq_factor", 1.0),
        original_max_position=values.get("original_max_position_embeddings", 0),
    )
    # PyTorch's float32 power and product round a bit differently now and then.
    np.testing.assert_array_max_ulp(rope.inverse_frequencies(head_dim), expected, maxulp=2)
    assert rope.parameters() == values


@pytest.mark.parametrize("kind", sorted(LONG_ROPES))
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_and_factor_are_those_of_transformers_when_the_context_was_lengthened(kind, head_dim):
    values = {"max_position_embeddings": 128, **LONG_ROPES[kind]}
    parameters = {"rope_theta": 10_000.0, **values["rope_parameters"]}
    if parameters["rope_type"] == "longrope":
        parameters |= {key: parameters[key] * (head_dim // 8) for key in ("short_factor", "long_factor")}
    context = values["max_position_embeddings"]
    rope = rope_of_fields(JsonFields({"rope_parameters": dict(parameters)}), context, head_dim)
    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(parameters), max_position_embeddings=context)
    rotary = LlamaRotaryEmbedding(config)
    np.testing.assert_array_max_ulp(rope.inverse_frequencies(head_dim), rotary.inv_freq.numpy(), maxulp=2)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    # What is written of it is the same rope.
    again = LlamaConfig(head_dim=head_dim, rope_parameters=rope.parameters(), max_position_embeddings=context)
    assert rope_of_fields(JsonFields(again.to_dict()), context, head_dim) == rope
    if parameters["rope_type"] == "longrope":
        rotary(torch.zeros(1), torch.tensor([[16]]))
        beyond = rope.inverse_frequencies(head_dim, beyond_original=True)
        np.testing.assert_array_max_ulp(beyond, rotary.inv_freq.numpy(), maxulp=2)
