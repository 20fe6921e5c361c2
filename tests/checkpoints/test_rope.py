"""Rotary frequencies are transformers', but for the last bits."""

import json

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


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("theta", "original", "beta_fast"),
    [
        (10_000.0, 4096, 32.0),  # both ends of the ramp lie among the pairs
        (1_000_000.0, 32_768, 32.0),
        (4.0, 4096, 424.0),  # it would end behind head_dim - 1, where it is cut
        (10_000.0, 6, 32.0),  # not even the first pair turns once: the ramp has no length
        (10_000.0, 4096, 1.0),  # nor has it between equal betas
        (10_000.0, 4096, 0.0),  # which is read as if it were left out
    ],
)
def test_yarn_is_transformers_wherever_its_ramp_begins_and_ends(theta, original, beta_fast, truncate):
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 8.0,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "truncate": truncate,
    }
    context = 8 * original
    rope = rope_of_fields(JsonFields({"rope_parameters": dict(parameters)}), context, 64)
    config = LlamaConfig(head_dim=64, rope_parameters=dict(parameters), max_position_embeddings=context)
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(rope.inverse_frequencies(64), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
@pytest.mark.parametrize("given", [{"attention_factor": 0.5}, {"factor": 1.0}, {"factor": 3.0}], ids=str)
def test_attention_factor_is_transformers_when_given_or_when_nothing_was_lengthened(kind, given):
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    parameters |= given
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = rope_of_fields(JsonFields({"rope_parameters": dict(parameters)}), 128, 8)
    config = LlamaConfig(head_dim=8, rope_parameters=dict(parameters), max_position_embeddings=128)
    assert rope.attention_factor == pytest.approx(LlamaRotaryEmbedding(config).attention_scaling, rel=1e-12)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope"])
@pytest.mark.parametrize(("inside", "taken"), [(16, 16), (None, 128)])
def test_original_context_outside_is_refused_when_transformers_takes_another(kind, inside, taken):
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    parameters |= {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    }.get(kind, {})
    parameters |= {} if inside is None else {"original_max_position_embeddings": inside}
    for outside in (taken, 64):
        values = {"rope_parameters": dict(parameters), "original_max_position_embeddings": outside}
        raw = {"head_dim": 8, "max_position_embeddings": 128, **json.loads(json.dumps(values))}
        assert LlamaConfig.from_dict(raw).rope_parameters["original_max_position_embeddings"] == taken
        fields = JsonFields(values)
        assert rope_of_fields(fields, 128, 8).original_max_position == taken
        wrong = (
            f"original_max_position_embeddings is {outside}, but transformers takes {taken}, by rope_parameters alone; "
            "expected rope_parameters.original_max_position_embeddings alike"
        )
        assert fields.problems == ([wrong] if outside != taken else [])


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_whole_head_is_rotated_when_the_share_is_one(place):
    share, parameters = {"partial_rotary_factor": 1.0}, {"rope_type": "default", "rope_theta": 5000.0}
    inside = place == "inside"
    fields = JsonFields({"rope_parameters": parameters | (share if inside else {}), **({} if inside else share)})
    assert rope_of_fields(fields, 128, 8) == RopeConfig("default", 5000.0)
    assert not fields.problems


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
FACTORS = "expected 1 positive numbers, one per rotated pair"


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic', which a head_dim of 2 does not allow"),
        (
            {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
            "rope_theta is 1.0, expected more than 1 for yarn",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": -0.5},
            "attention_factor is -0.5, expected a finite number from 0 on",
        ),
        (
            LONGROPE | {"original_max_position_embeddings": 1, "factor": 2.0},
            "original_max_position_embeddings is 1, expected the context the model was first trained on",
        ),
        (LONGROPE | {"attention_factor": -0.5}, "attention_factor is -0.5, expected a finite number from 0 on"),
        (LONGROPE | {"short_factor": [0.0]}, f"short_factor is [0.0], {FACTORS}"),
        (LONGROPE | {"long_factor": ["1"]}, f"long_factor is ['1'], {FACTORS}"),
        (LONGROPE | {"long_factor": 1.0}, f"long_factor is 1.0, {FACTORS}"),
    ],
)
def test_rope_is_refused_by_the_field_when_no_frequencies_come_of_it(parameters, problem):
    fields = JsonFields({"rope_parameters": parameters})
    rope_of_fields(fields, 128, 2)
    assert fields.problems == [f"rope_parameters.{problem}"]
