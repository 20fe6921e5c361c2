"""Rotary frequencies are transformers', but for the last bits."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dlo_export.checkpoints.rope import RopeConfig
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
