"""Models and options as they are found in the world: exported, warned of, or refused by name."""

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.exporter.calibrate import CalibrationRequest, source_text
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt, size_warnings
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings
from tests.exporter.forked_commands import run as dlo
from tests.exporter.test_cli import check_refused
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama


@pytest.fixture(scope="module")
def artefact_folder(tmp_path_factory):
    """An artefact with a tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("found")
    folder = save_tiny_llama(root / "model", vocab=BYTE_VOCABULARY, tokenizer=True)
    export_model(ExportRequest(str(folder), root / "artefact", parity=False), Reporter())
    return root / "artefact"


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_artefact_says_what_it_was_when_the_model_is_a_mistral(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=8,
        sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    result = export_model(ExportRequest(str(tmp_path / "model"), tmp_path / "out"), Reporter())
    assert result.description.parity.verdict == "PASS"
    assert result.description.source.model_type == "mistral"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (written["num_key_value_heads"], written["max_position_embeddings"]) == (8, 131_072)


def test_parity_passes_when_fields_that_are_not_arithmetic_are_odd(tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    odd = {"pad_token_id": 97, "attention_bias": None, "hidden_act": None, "torch_dtype": None, "use_cache": None}
    odd |= {"attn_implementation": "flash_attention_2", "output_attentions": False, "initializer_range": None}
    odd |= {"torchscript": "yes", "return_dict": 3, "id2label": 5, "problem_type": "x", "attention_dropout": "none"}
    rewrite_config(folder, **odd)
    result = export_model(ExportRequest(str(folder), tmp_path / "out"), Reporter())
    assert result.description.parity.verdict == "PASS"


def test_expansion_is_refused_by_name_when_it_makes_a_million_layers(tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    options = ["--method", "llama-pro", "--groups", "3", "--per-group", "1000000"]
    check_refused(dlo("expand", folder, "-o", tmp_path / "out", *options), tmp_path, "3000003 layers", "10000")


@pytest.mark.parametrize("option", ["MODEL", "--adapter"])
def test_export_is_refused_when_a_name_is_longer_than_any_files(tmp_path, option):
    folder = save_tiny_llama(tmp_path / "model")
    given = ["y" * 5000] if option == "MODEL" else [folder, "--adapter", "y" * 5000]
    check_refused(dlo("export", *given, "-o", tmp_path / "out"), tmp_path, "File name too long")


def test_model_is_exported_to_a_place_that_can_be_read_when_its_name_is_not_utf8(tmp_path):
    folder = save_tiny_llama(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    result = export_model(ExportRequest(str(folder), tmp_path / "out"), Reporter())
    assert result.description.parity.verdict == "PASS"
    assert onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.name == r"caf\udce9"
    with pytest.raises(InputError, match=r"its path is not UTF-8[\s\S]*hint: give another folder"):
        export_model(ExportRequest(str(folder), Path(f"{folder}-dlo")), Reporter())


def test_run_warns_when_prompt_and_answer_go_beyond_the_context(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, tokenizer=True)
    export_model(ExportRequest(str(folder), tmp_path / "out", parity=False), Reporter())
    within, beyond = (dlo("run", tmp_path / "out", "x" * 100, "--raw", "-n", tokens) for tokens in (28, 29))
    assert (within.returncode, beyond.returncode) == (0, 0)
    assert "warning" not in within.stderr
    assert "warning: a prompt of 100 tokens and up to 29 new ones go beyond the model's context of 128" in beyond.stderr


def test_bench_warns_when_its_workload_goes_beyond_the_context(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, tokenizer=True)
    export_model(ExportRequest(str(folder), tmp_path / "out", parity=False), Reporter())
    given = ("bench", tmp_path / "out", "--prompt-tokens", "120", "--rounds", "1", "--decode-tokens")
    within, beyond = (dlo(*given, steps) for steps in (8, 9))
    assert (within.returncode, beyond.returncode) == (0, 0)
    assert "warning" not in within.stderr
    assert "120 tokens and 9 steps go beyond its context of 128" in beyond.stderr


def test_run_is_refused_when_the_prompt_is_not_utf8(tmp_path):
    folder = save_tiny_llama(tmp_path / "model", vocab=BYTE_VOCABULARY, tokenizer=True)
    export_model(ExportRequest(str(folder), tmp_path / "artefact", parity=False), Reporter())
    prompt = os.fsdecode(b"caf\xe9")  # as Python gives a program's arguments
    check_refused(dlo("run", tmp_path / "artefact", prompt, "--raw"), tmp_path, "UTF-8")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "is unsafe"),
    ],
)
def test_run_is_refused_when_the_chat_template_fails_and_takes_the_prompt_raw(
    tmp_path, artefact_folder, template, said
):
    folder = shutil.copytree(artefact_folder, tmp_path / "artefact")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    result = dlo("run", folder, "hello", "-n", "1")
    check_refused(result, tmp_path, "the chat template failed: ", said, "try --raw")
    assert result.stdout == ""
    raw = dlo("run", folder, "hello", "-n", "1", "--raw")
    assert raw.returncode == 0, raw.stderr


@pytest.mark.parametrize("content", [None, {"model": 3}])
def test_calibration_is_refused_with_the_models_name_when_it_has_no_usable_tokenizer(tmp_path, content):
    folder = save_tiny_llama(tmp_path / "model")
    if content is not None:
        (folder / "tokenizer.json").write_text(json.dumps(content))
    source = open_source(folder, None)
    request = CalibrationRequest(
        str(folder), tmp_path / "out", None, False, CalibrationSettings(), None, 512, 512, seed=0, force=False
    )
    with pytest.raises(CheckpointError, match=rf"{folder}: .*tokenizer[\s\S]*hint: save the tokenizer"):
        source_text(source, request)


def test_engines_are_warned_of_when_their_cache_is_beyond_the_context(tmp_path):
    source = open_source(save_tiny_llama(tmp_path / "model"), None)
    assert size_warnings(source, TensorRtRequest(max_cache=128)) == []
    (warning,) = size_warnings(source, TensorRtRequest(max_cache=129))
    assert "--trt-max-cache 129 is beyond the model's context of 128 tokens" in warning


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"max_cache": 2**31 - 1, "max_batch": 2**31 - 1}, "--trt-max-cache"),
        ({"max_sequence": 2**31 - 1, "max_cache": 2**31 - 1}, "--trt-max-sequence"),
    ],
)
def test_engines_are_refused_when_no_gpu_could_hold_their_steps(tmp_path, sizes, named):
    source = open_source(save_tiny_llama(tmp_path / "model"), None)
    with pytest.raises(InputError, match=rf"{named}.* takes \d+ GB[\s\S]*hint: choose smaller"):
        plan_tensorrt(source, TensorRtRequest(backend="rtx", **sizes), "auto", "auto")
