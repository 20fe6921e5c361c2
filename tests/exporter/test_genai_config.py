"""genai_config.json for border cases; that onnxruntime-genai runs with it, test_genai.py shows."""

import json

import onnxruntime_genai as og
import pytest

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.checkpoints.interface import TOKEN_INPUTS
from dlo_export.exporter.genai_config import carried_genai_config, genai_config, with_operator_library
from dlo_export.runtimes.onnxruntime.providers import CUDA
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def config(tmp_path):
    return LlamaConfig.from_json(save_tiny_llama(tmp_path / "model", vocab=97) / "config.json")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (GenerationConfig(1, (2,), 0), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
        (GenerationConfig(None, (2, 5), None), {"eos_token_id": [2, 5], "pad_token_id": 2}),
        (GenerationConfig(1, (), 97), {"bos_token_id": 1, "eos_token_id": [], "pad_token_id": 0}),
    ],
)
def test_missing_and_impossible_tokens_are_left_out_or_replaced(config, generation, expected):
    model = genai_config(config, 3, generation, TOKEN_INPUTS)["model"]
    assert {key: value for key, value in model.items() if key.endswith("token_id")} == expected


def test_only_inputs_that_the_graph_has_are_named(config):
    decoder = genai_config(config, 5, GenerationConfig(), TOKEN_INPUTS[:2])["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 5
    assert set(TOKEN_INPUTS) & decoder["inputs"].keys() == set(TOKEN_INPUTS[:2])


def test_operator_library_is_named_as_long_as_the_graph_needs_it_when_nobody_named_another(config):
    dense = genai_config(config, 3, GenerationConfig(), TOKEN_INPUTS)
    named = with_operator_library(dense, needed=True)
    assert named["model"]["decoder"]["session_options"]["custom_ops_library"] == "libdlo_ort.so"
    assert with_operator_library(named, needed=False) == with_operator_library(dense, needed=False) == dense
    theirs = {"model": {"decoder": {"session_options": {"custom_ops_library": "theirs.so"}}}}
    assert with_operator_library(theirs, needed=True) == with_operator_library(theirs, needed=False) == theirs
    without = {"model": {"decoder": {}}}
    assert with_operator_library(without, needed=False) == without


def test_cuda_computes_float32_in_float32_when_genai_runs_the_graph(config, tmp_path):
    settings = genai_config(config, 3, GenerationConfig(), TOKEN_INPUTS, "cuda")
    assert settings["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {"use_tf32": "0"}}]
    assert CUDA.options == {"use_tf32": "0"}  # what parity runs with
    # onnxruntime-genai reads options as strings, and hands them on; anything else it refuses.
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    og.Config(str(tmp_path))
    settings["model"]["decoder"]["session_options"]["provider_options"][0]["cuda"]["use_tf32"] = 0
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="use_tf32"):
        og.Config(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "routed", "carried"),
    [
        ([{"cuda": {}}], True, [{"cuda": {"use_tf32": "0"}}]),
        ([{"cuda": {"use_tf32": "1", "enable_cuda_graph": "1"}}], True, None),  # somebody wants it so
        ([{"cuda": {}}], False, None),
        ([{"dml": {}}, "odd"], True, None),
        ([], True, None),
    ],
)
def test_carried_settings_keep_routers_in_float32_when_cuda_runs_them_and_say_nothing_of_it(given, routed, carried):
    settings = {"model": {"decoder": {"session_options": {"log_id": "x", "provider_options": given}}}}
    decoder = carried_genai_config(settings, 5, routed=routed)["model"]["decoder"]
    assert decoder["session_options"] == {"log_id": "x", "provider_options": given if carried is None else carried}
    bare = carried_genai_config({"model": {"decoder": {}}}, 5, routed=True)["model"]["decoder"]
    assert bare == {"filename": "model.onnx", "num_hidden_layers": 5}
