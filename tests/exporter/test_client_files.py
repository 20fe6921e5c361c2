"""What an artefact tells other programs: config.json, generation_config.json, genai_config.json and the graph."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai as og
import pytest
from transformers import AutoConfig

import dlo_export
from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.commands import run
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.generation.tokenizer import Tokenizer
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama
from tests.tiny_sentencepiece import VOCABULARY, gguf_metadata, train_sentencepiece

OPTIMUM = Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx"
# Llama 3 Instruct's: the end of a turn is in generation_config.json alone.
CHAT = {"bos_token_id": 1, "eos_token_id": [2, 9, 11], "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def exported(model, folder):
    export_model(ExportRequest(str(model), folder, parity=False), Reporter())
    return folder


def changed(file, **values):
    """Changes keys of a JSON file; None means null."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def model(tmp_path):
    return save_tiny_llama(
        tmp_path / "model", vocab=BYTE_VOCABULARY + 1, tokenizer=True, routed=[True, False, True], head_dim=8
    )


@pytest.fixture
def chat_artefact(model, tmp_path):
    (model / "generation_config.json").write_text(json.dumps(CHAT))
    return exported(model, tmp_path / "artefact")


def test_config_says_llama_to_others_and_what_routes_to_us_when_the_model_is_routed(model, tmp_path):
    del_kv_heads(model)
    artefact = exported(model, tmp_path / "artefact")
    values = json.loads((artefact / "config.json").read_text())
    assert values["model_type"] == "llama"
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["num_key_value_heads"] == 4, "others would guess where the checkpoint says nothing"
    assert AutoConfig.from_pretrained(artefact).model_type == "llama"
    assert (
        LlamaConfig.from_json(artefact / "config.json").routing == LlamaConfig.from_json(model / "config.json").routing
    )


def del_kv_heads(model):
    """A checkpoint without grouped queries that does not say so, as those of Llama 1 do not."""
    shutil.rmtree(model)
    save_tiny_llama(model, kv_heads=4, vocab=BYTE_VOCABULARY + 1, tokenizer=True, routed=[True, False, True])
    values = json.loads((model / "config.json").read_text())
    del values["num_key_value_heads"]
    (model / "config.json").write_text(json.dumps(values))


def test_other_programs_are_told_to_refuse_when_whole_layers_are_skipped(tmp_path, capsys):
    model = save_tiny_llama(tmp_path / "model", routed=[True, False, True], model_type="llama_dlo")
    folder = exported(model, tmp_path / "artefact")
    warning = " ".join(capsys.readouterr().err.split())
    for words in (
        "warning: tokens that skip leave no keys: ",
        "past_active.{i}",
        "genai_config.json is left out",
        "docs/artefact.md",
    ):
        assert words in warning
    assert not (folder / "genai_config.json").exists()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config.get("dlo_model_type")) == ("llama_dlo", None)
    assert LlamaConfig.from_json(folder / "config.json").routing.kind == "layer"
    # A Llama's cache alone is not enough: ONNX Runtime names what is missing.
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    feeds = {
        value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape], np.int64)
        for value in session.get_inputs()[:3]
    }
    with pytest.raises(ValueError, match=r"past_active\.0"):
        session.run(None, feeds)


def test_config_has_no_type_of_ours_when_the_model_is_a_plain_llama(tmp_path):
    artefact = exported(save_tiny_llama(tmp_path / "model"), tmp_path / "artefact")
    assert "dlo_model_type" not in json.loads((artefact / "config.json").read_text())


def test_checkpoint_is_refused_when_its_own_model_type_is_unknown(model):
    changed(model / "config.json", model_type="llama", dlo_model_type="llama_dlo_future")
    with pytest.raises(CheckpointError, match="model_type is 'llama_dlo_future'"):
        LlamaConfig.from_json(model / "config.json")


def test_cache_is_named_as_clients_look_for_it_when_exported(model, tmp_path):
    graph = onnx.load(exported(model, tmp_path / "artefact") / "model.onnx", load_external_data=False).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch_size", value.name


def test_graph_says_who_made_it_from_what_when_exported(model, tmp_path):
    proto = onnx.load(exported(model, tmp_path / "artefact") / "model.onnx", load_external_data=False)
    assert (proto.producer_name, proto.producer_version) == ("dlo-export", dlo_export.__version__)
    assert proto.graph.name == "model"
    assert "3 layers (0 injected, 2 routed, lowering compact)" in proto.doc_string
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert [run["name"] for run in json.loads(metadata.pop("dlo.passes"))][:2] == [
        "RouteLayersPass",
        "LowerSkipToCompactionPass",
    ]
    assert metadata == {
        "model_name": "model",
        "dlo_export_version": dlo_export.__version__,
        "dtype": "fp32",
        "lowering": "compact",
        "num_layers": "3",
        "injected_layers": "",
        "routed_layers": "0 2",
    }


def test_another_exporters_graph_opens_in_genai_and_names_its_origin_when_routed(tmp_path):
    graph = open_foreign_graph(OPTIMUM)
    hidden = graph.tensors["model.norm.weight"].shape[0]
    plan = placements("tli", graph.num_layers, every=1, init="zero_out")
    injection = expansion_adapter(graph.tensors, plan)
    router = ArrayTensor(np.random.default_rng(0).standard_normal((1, hidden), dtype=np.float32))
    is_dlo = (True, *[False] * (plan.num_layers - 1))
    tensors = {**injection.tensors, "model.routers.0.weight": router}
    save_adapter(dataclasses.replace(injection, is_dlo=is_dlo, tensors=tensors), tmp_path / "adapter")
    request = ExportRequest(str(OPTIMUM), tmp_path / "artefact", adapter=tmp_path / "adapter", parity=False)
    export_model(request, Reporter())
    proto = onnx.load(tmp_path / "artefact" / "model.onnx", load_external_data=False)
    notes = {entry.key: entry.value for entry in proto.metadata_props}
    assert proto.producer_name == "dlo-export"
    assert notes["source_producer"].startswith("pytorch ")
    assert notes["injected_layers"] == " ".join(str(layer.position) for layer in plan.injected_layers)
    config = json.loads((tmp_path / "artefact" / "config.json").read_text())
    assert (config["model_type"], config["dlo_model_type"]) == ("llama", "llama_dlo_exattn")
    declared = json.loads((tmp_path / "artefact" / "genai_config.json").read_text())["model"]["decoder"]["inputs"]
    assert {name for name in declared if not name.startswith("past_")} == {
        value.name for value in proto.graph.input if not value.name.startswith("past_")
    }
    og.Model(str(tmp_path / "artefact"))


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "sentencepiece"])
def test_tokenizer_gives_no_token_type_ids_when_written_from_gguf(tmp_path, kind):
    folder = save_tiny_llama(tmp_path / "model", vocab=VOCABULARY)
    given = (
        {"metadata": gguf_metadata(train_sentencepiece(tmp_path))} if kind == "sentencepiece" else {"tokenizer": kind}
    )
    artefact = exported(save_tiny_gguf(folder, tmp_path / "model.gguf", **given), tmp_path / "artefact")
    settings = json.loads((artefact / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"], "transformers 4 adds a third by default"


def test_generation_config_is_the_checkpoints_when_it_has_one(chat_artefact):
    assert json.loads((chat_artefact / "generation_config.json").read_text()) == CHAT


def test_genai_config_has_end_tokens_and_sampling_when_only_generation_config_has_them(chat_artefact):
    values = json.loads((chat_artefact / "genai_config.json").read_text())
    assert values["model"]["eos_token_id"] == [2, 9, 11]
    assert {key: values["search"][key] for key in ("do_sample", "temperature", "top_k", "top_p")} == {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 50,
        "top_p": 0.9,
    }
    og.Model(str(chat_artefact))


@pytest.mark.parametrize(
    "tokens", [{"bos_token_id": None}, {"eos_token_id": None}, {"pad_token_id": BYTE_VOCABULARY + 1}]
)
def test_genai_generates_when_a_special_token_is_null_or_beyond_the_vocabulary(model, tmp_path, tokens):
    (model / "generation_config.json").unlink()
    changed(model / "config.json", **tokens)
    genai = og.Model(str(exported(model, tmp_path / "artefact")))
    options = og.GeneratorParams(genai)
    options.set_search_options(max_length=8, batch_size=2)
    generator = og.Generator(genai, options)
    generator.append_tokens([[5, 6, 7], [8, 9, 10]])
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 3


def test_run_ends_at_a_token_when_only_generation_config_has_it(model, tmp_path, capsys):
    artefact = exported(model, tmp_path / "artefact")
    prompt = Tokenizer(artefact).encode("skip it")
    with open_artefact(artefact) as runner:
        tokens = generate(runner, [prompt], max_new_tokens=12).sequences[0]
    changed(artefact / "generation_config.json", eos_token_id=[tokens[5]])
    run.main(artefact, "skip it", raw=True, max_new_tokens=12)
    assert f"{tokens.index(tokens[5]) + 1} new ones" in capsys.readouterr().err


def test_run_samples_as_the_model_says_unless_told_otherwise(chat_artefact, capsys):
    changed(chat_artefact / "generation_config.json", temperature=50.0, top_k=0, top_p=1.0, eos_token_id=[2])

    def text(**options):
        run.main(chat_artefact, "a", raw=True, max_new_tokens=8, **options)
        return capsys.readouterr().out

    greedy = text(temperature=0.0, seed=1)
    assert greedy == text(temperature=0.0, seed=2)
    assert len({greedy, text(seed=1), text(seed=2)}) == 3


def test_run_warns_when_the_model_asks_for_what_it_does_not_do(chat_artefact, capsys):
    changed(chat_artefact / "generation_config.json", repetition_penalty=1.1)
    run.main(chat_artefact, "a", max_new_tokens=1)
    assert "repetition_penalty 1.1, which is not applied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eos_token_id": "</s>"}, ["eos_token_id", "'</s>'"]),
        ({"eos_token_id": [2, -5]}, ["eos_token_id"]),
        ({"bos_token_id": 1.5}, ["bos_token_id is 1.5"]),
        ({"do_sample": "yes"}, ["do_sample is 'yes'"]),
        ({"do_sample": True, "temperature": 0}, ["temperature is 0, expected a positive number"]),
        ({"do_sample": True, "top_p": 1.5, "top_k": -1}, ["top_p is 1.5", "top_k is -1"]),
    ],
)
def test_export_names_the_fields_when_generation_config_is_malformed(model, tmp_path, values, words):
    changed(model / "generation_config.json", **values)
    # The model's file, not the copy that goes with everything half-written.
    with pytest.raises(CheckpointError, match=f"{model}/generation_config.json: not a generation conf") as caught:
        exported(model, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    (model / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"{model}/generation_config.json: cannot be read"):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": -1}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": 9}, {"eos_token_id": 7}, (9,)),
        ({"eos_token_id": [9, 10]}, {"eos_token_id": None}, (9, 10)),
        ({"temperature": 0, "top_k": -3}, {"eos_token_id": None}, ()),
    ],
)
def test_generation_config_overrules_the_configs_tokens_when_it_has_any(model, generation, config, expected):
    changed(model / "config.json", **config)
    (model / "generation_config.json").write_text(json.dumps(generation))
    assert GenerationConfig.from_folder(model).eos_token_id == expected


def test_generation_config_is_empty_when_there_is_no_file(tmp_path):
    assert GenerationConfig.from_folder(tmp_path) == GenerationConfig()
