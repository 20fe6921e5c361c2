from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dlo_export.checkpoints.config import LlamaConfig, RopeConfig, RoutingConfig
from dlo_export.checkpoints.errors import CheckpointError
from tests.tiny_models import ROPES

REFERENCES = Path(__file__).parents[1] / "data"
MINIMAL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
ROUTED = MINIMAL | {
    "model_type": "llama_dlo_exattn",
    "is_dlo": [True, False, True, True],
    "rescale_hidden_states": True,
    "scale_factor": 1.5,
    "scale_gap": 0.25,
}

ACTIVE = {"attention_routing_kv": "active"}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def test_config_reads_every_field_when_the_authors_code_saved_it() -> None:
    config = LlamaConfig.from_json(REFERENCES / "reference_mlp_routed" / "config.json")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (131, 48, 112, 4)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 8)
    assert config.rms_norm_eps == 1e-5
    assert config.rope == RopeConfig("default", 50_000.0)
    assert (config.attention_bias, config.mlp_bias, config.tie_word_embeddings) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2,), None)
    assert (config.dtype, config.max_position_embeddings) == ("float32", 128)
    assert config.routing == RoutingConfig("mlp", (0, 1, 3), rescale=True, scale_factor=2.0, scale_gap=0.05)
    assert config.raw["dlo_capacity"] == 0.7


def test_config_says_layer_routing_when_the_authors_saved_it() -> None:
    config = LlamaConfig.from_json(REFERENCES / "reference_layer_routed" / "config.json")
    assert config.routing == RoutingConfig("layer", (0, 2, 3), rescale=True, scale_factor=2.0, scale_gap=0.05)


@pytest.mark.parametrize(
    ("keys", "kind"), [({}, "attention"), ({"attention_routing_kv": "all"}, "attention"), (ACTIVE, "attention-active")]
)
def test_config_says_what_skipped_tokens_leave_when_attention_is_routed(keys: dict[str, Any], kind: str) -> None:
    config = LlamaConfig.from_dict(ROUTED | {"model_type": "llama_dlo_attn"} | keys)
    assert config.routing is not None
    assert config.routing.kind == kind
    assert LlamaConfig.from_dict(config.model_values()).routing == config.routing


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_routing_kv": "none"}, "attention_routing_kv is 'none', expected 'all' or 'active'"),
        ({"attention_routing_kv": ["all"]}, r"attention_routing_kv is \['all'\], expected 'all' or 'active'"),
        (ACTIVE | {"model_type": "llama_dlo"}, "attention_routing_kv is 'active', but model_type 'llama_dlo' skips no"),
    ],
)
def test_config_is_refused_when_it_leaves_other_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_dict(ROUTED | {"model_type": "llama_dlo_attn"} | keys)


def test_config_has_transformers_defaults_when_keys_are_left_out() -> None:
    config = LlamaConfig.from_dict(MINIMAL)
    reference = transformers.LlamaConfig(**without(MINIMAL, "model_type"))
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == reference.head_dim
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert (config.attention_bias, config.mlp_bias) == (reference.attention_bias, reference.mlp_bias)
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert (config.bos_token_id, *config.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert config.pad_token_id == reference.pad_token_id


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_inverse_frequencies_equal_transformers_when_scaled(rope: str, head_dim: int) -> None:
    reference = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=256, rope_parameters=dict(ROPES[rope])
    )
    expected = LlamaRotaryEmbedding(reference).inv_freq.numpy()
    frequencies = LlamaConfig.from_dict(reference.to_dict()).rope.inverse_frequencies(head_dim)
    assert frequencies.dtype == np.float32
    # Two units in the last place: PyTorch's power is not always rounded correctly, and differs between CPUs.
    np.testing.assert_allclose(frequencies, expected, rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_the_same_when_the_keys_are_old(rope: str) -> None:
    parameters = ROPES[rope]
    new = LlamaConfig.from_dict(MINIMAL | {"rope_parameters": parameters})
    scaling = without(parameters, "rope_theta", "rope_type")
    old = {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling | {"type": parameters["rope_type"]}}
    assert LlamaConfig.from_dict(MINIMAL | old).rope == new.rope
    assert new.rope.kind == rope
    assert new.rope.theta == parameters["rope_theta"]


def test_rope_scales_from_the_whole_context_when_llama3_names_none() -> None:
    parameters = without(ROPES["llama3"], "original_max_position_embeddings")
    values = MINIMAL | {"rope_parameters": parameters, "max_position_embeddings": 512}
    assert LlamaConfig.from_dict(values).rope.original_max_position == 512


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 12},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ],
)
def test_tensor_shapes_equal_transformers_when_the_architecture_varies(keys: dict[str, Any]) -> None:
    values = MINIMAL | keys
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**without(values, "model_type")))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert LlamaConfig.from_dict(values).tensor_shapes() == expected


def test_tensor_shapes_have_routers_with_holes_when_some_layers_are_routed() -> None:
    routers = {name: shape for name, shape in LlamaConfig.from_dict(ROUTED).tensor_shapes().items() if "router" in name}
    assert routers == {f"model.routers.{layer}.weight": (1, 32) for layer in (0, 2, 3)}


@pytest.mark.parametrize(("is_dlo", "layers"), [(True, (0, 1, 2, 3)), ([False, True, False, False], (1,))])
def test_routing_names_the_layers_when_is_dlo_marks_them(is_dlo: bool | list[bool], layers: tuple[int, ...]) -> None:
    routing = LlamaConfig.from_dict(ROUTED | {"is_dlo": is_dlo}).routing
    assert routing == RoutingConfig("mlp", layers, rescale=True, scale_factor=1.5, scale_gap=0.25)


@pytest.mark.parametrize("is_dlo", [False, [False] * 4])
def test_routing_is_none_when_no_layer_is_routed(is_dlo: bool | list[bool]) -> None:
    assert LlamaConfig.from_dict(ROUTED | {"is_dlo": is_dlo}).routing is None


def test_routing_multiplies_by_one_when_nothing_is_rescaled() -> None:
    values = without(ROUTED, "scale_factor", "scale_gap") | {"rescale_hidden_states": False}
    assert LlamaConfig.from_dict(values).routing == RoutingConfig("mlp", (0, 2, 3), False, 2.0, 0.0)


@pytest.mark.parametrize("key", ["is_dlo", "rescale_hidden_states", "scale_factor", "scale_gap"])
def test_routing_is_refused_when_a_key_is_missing(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        LlamaConfig.from_dict(without(ROUTED, key))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"model_type": "gemma3"},
            "model_type is 'gemma3', expected one of llama, mistral, ministral, qwen2, qwen3, sm",
        ),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling.rope_type is 'proportional', expected one of"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling.rope_type is \['yarn'\]"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor is 0.5, expected a finite number from 1 on"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
        # In float32 these are 0, which would be divided by.
        ({"rope_scaling": {"type": "linear", "factor": 1e-50}}, "rope_scaling.factor is 1e-50, expected 1.2e-38 at"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 1e-320}}, "beta_slow is 1e-320, expected 1.2e-38"),
        ({"model_type": "granite", "logits_scaling": 1e-50}, "logits_scaling is 1e-50, expected 1.2e-38 at least"),
        (
            {"rope_scaling": {"type": "yarn", "beta_fast": 1, "beta_slow": 2}},
            "beta_fast is 1.0, expected at least beta",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor is None, expected 4 positive numbers"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0]}},
            "rope_parameters.long_factor has 2 entries, expected 4 positive numbers",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config says quant_method 'fp8', expected unq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "says quant_method 'compressed-tensors'"),
        ({"compression_config": {"format": "float-quantized"}}, "compression_config is set, expected unquantised"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is set, expected unquantised weights"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\], expected 1 or 0 for each"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, expected a positive"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0, expected a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters differs by layer type"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing, expected a positive number"),
        ({"rope_parameters": ROPES["llama3"] | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0, expected more"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"hidden_size": 34}, "hidden_size is 34, expected a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple of num_key_value_heads"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer from 1 to 10000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected an integer from 1 to 10000"),
        ({"vocab_size": 0}, "vocab_size is 0, expected a positive integer"),
        ({"vocab_size": 10**400}, "vocab_size is 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id is"),
        ({"bos_token_id": 1.0}, "bos_token_id is 1.0, expected a token id"),
        ({"bos_token_id": -2}, "bos_token_id is -2, expected a token id"),
        ({"pad_token_id": 98}, r"pad_token_id is 98, expected at most vocab_size \(97\)"),
        ({"initializer_range": "0.02"}, "initializer_range is '0.02', expected a finite number from 0 on"),
        ({"initializer_range": -1}, "initializer_range is -1, expected a finite number from 0 on"),
        ({"attn_implementation": "paged"}, "attn_implementation is 'paged', expected one of eager, sdpa"),
        ({"attn_implementation": ["eager"]}, "attn_implementation is"),
        ({"output_attentions": True}, "output_attentions is True, expected false"),
        ({"output_hidden_states": "no"}, "output_hidden_states is 'no', expected false"),
        ({"is_dlo": "yes"}, "is_dlo is 'yes', expected true, false or a list of them"),
        ({"is_dlo": 1}, "is_dlo is 1, expected true, false or a list of them"),
        ({"is_dlo": {}}, "is_dlo is {}, expected true, false or a list of them"),
        ({"is_dlo": [False]}, r"is_dlo has 1 entries, expected num_hidden_layers \(4\)"),
        ({"is_dlo": True}, "is_dlo marks routed layers, but model_type 'llama'"),
        (ROUTED | {"is_dlo": [True]}, r"is_dlo has 1 entries, expected num_hidden_layers \(4\)"),
        (ROUTED | {"is_dlo": [1, 0, 1, 1]}, "expected true, false or a list of them"),
        (ROUTED | {"scale_factor": 1e39}, r"scale_factor is 1e\+39, expected a finite number"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps is 1e\+300, expected a positive number"),
        (ROUTED | {"scale_gap": "0.1"}, "scale_gap is '0.1', expected a finite number"),
    ],
)
def test_config_is_refused_by_name_when_a_field_is_unsupported(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        LlamaConfig.from_dict(MINIMAL | keys, origin="somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json: ")
    assert "hint: " in str(caught.value)


def injected(**changes: Any) -> dict[str, Any]:
    return {"position": 1, "source": 0, "init": "copy"} | changes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (5, "injected_layers is 5, expected a list"),
        (0, "injected_layers is 0, expected a list"),
        ("", "injected_layers is '', expected a list"),
        ({}, "injected_layers is {}, expected a list"),
        ([3], r"injected_layers\[0\] is 3, expected an object"),
        ([None], r"injected_layers\[0\] is None, expected an object"),
        ([{"position": 1}], r"injected_layers\[0\] is .*, expected an object with position, source and init"),
        ([injected(more=1)], r"injected_layers\[0\] is .*, expected an object with position, source and init"),
        ([injected(position="1")], r"injected_layers\[0\]\.position is '1', expected an integer from 0 to 3"),
        ([injected(position=True)], r"injected_layers\[0\]\.position is True"),
        ([injected(position=4)], r"injected_layers\[0\]\.position is 4"),
        ([injected(source=-1)], r"injected_layers\[0\]\.source is -1, expected an integer from 0 to 9999"),
        ([injected(source=10_000)], r"injected_layers\[0\]\.source is 10000"),
        ([injected(init="magic")], r"injected_layers\[0\]\.init: .*found 'magic'"),
        ([injected(init=["copy"])], r"injected_layers\[0\]\.init: .*found \['copy'\]"),
        ([injected(), injected()], r"injected_layers are at \[1, 1\], expected rising positions"),
        ([injected(position=2), injected()], r"injected_layers are at \[2, 1\], expected rising positions"),
    ],
)
def test_config_is_refused_when_injected_layers_have_a_wrong_form(entries: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_dict(MINIMAL | {"injected_layers": entries})


@pytest.mark.parametrize(
    "keys",
    [
        {"pad_token_id": 97},  # one behind the vocabulary
        {"hidden_act": None, "attention_bias": None, "mlp_bias": None, "tie_word_embeddings": None},
        {"rope_theta": None, "rope_scaling": None, "rope_parameters": None, "head_dim": None},
        {"rope_parameters": {"rope_type": None, "type": None, "rope_theta": None}, "rope_scaling": {}},
        {"num_key_value_heads": None, "rms_norm_eps": None, "max_position_embeddings": None, "dtype": None},
        {"sliding_window": None, "quantization_config": None, "initializer_range": None, "injected_layers": None},
        {"is_dlo": None, "attn_implementation": None, "output_attentions": None, "output_hidden_states": False},
        {"attn_implementation": "flash_attention_2", "injected_layers": [], "is_dlo": [False] * 4},
    ],
)
def test_config_means_the_same_when_fields_are_null_or_say_nothing_of_the_arithmetic(keys: dict[str, Any]) -> None:
    assert LlamaConfig.from_dict(MINIMAL | keys).model_values() == LlamaConfig.from_dict(MINIMAL).model_values()


@pytest.mark.parametrize("rope", ROPES)
def test_model_values_say_the_same_model_when_transformers_reads_them(rope: str) -> None:
    config = LlamaConfig.from_dict(MINIMAL | {"rope_parameters": ROPES[rope], "num_key_value_heads": 2, "head_dim": 12})
    read = transformers.LlamaConfig(**without(config.model_values(), "model_type")).to_dict()
    again = LlamaConfig.from_dict(read)
    assert again.model_values() == config.model_values()
    assert (again.rope, again.tensor_shapes()) == (config.rope, config.tensor_shapes())


def test_model_values_name_the_routing_when_layers_are_routed() -> None:
    config = LlamaConfig.from_dict(ROUTED)
    assert LlamaConfig.from_dict(config.model_values()).routing == config.routing


def test_config_lists_every_problem_and_no_consequence_when_several_fields_are_wrong() -> None:
    values = without(ROUTED, "hidden_size", "scale_gap") | {"hidden_act": "gelu", "num_attention_heads": 5}
    with pytest.raises(CheckpointError) as caught:
        LlamaConfig.from_dict(values)
    problems = [line.split()[0] for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert sorted(problems) == ["hidden_act", "hidden_size", "scale_gap"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"bos_token_id": None, "eos_token_id": None}, (None, (), None)),
        ({"eos_token_id": [2, 7], "pad_token_id": -1}, (1, (2, 7), None)),
        ({"pad_token_id": 0}, (1, (2,), 0)),
    ],
)
def test_special_tokens_are_normalised_when_written_in_other_ways(keys: dict[str, Any], expected: tuple) -> None:
    config = LlamaConfig.from_dict(MINIMAL | keys)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == expected


@pytest.mark.parametrize(
    ("keys", "dtype"), [({}, None), ({"torch_dtype": "float16"}, "float16"), ({"dtype": "torch.bfloat16"}, "bfloat16")]
)
def test_dtype_is_read_when_either_key_names_it(keys: dict[str, Any], dtype: str | None) -> None:
    assert LlamaConfig.from_dict(MINIMAL | keys).dtype == dtype


@pytest.mark.parametrize("content", ["", "{", "[1]", '"llama"', "\udcff", "[" * 100_000])
def test_config_file_is_refused_when_it_is_no_json_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LlamaConfig.from_json(path)


def test_config_file_is_refused_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        LlamaConfig.from_json(tmp_path / "config.json")


def test_config_file_is_the_same_as_its_object_when_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ROUTED))
    assert LlamaConfig.from_json(path) == LlamaConfig.from_dict(ROUTED)
