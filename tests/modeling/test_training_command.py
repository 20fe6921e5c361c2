import json
import os
import signal
import time
from pathlib import Path

import pytest

from dlo_export.checkpoints.files.folder_kind import FolderKind, folder_kind
from tests.exporter.forked_commands import Ended, ended, run, start
from tests.modeling.training_runs import log_of, save_chats, save_routed
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

OPTIONS = ("--sequence", 64, "--batch", 2, "--target", 0.7, "--anneal-steps", 10, "--learning-rate", 1e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed and a plain checkpoint, and chats."""
    folder = tmp_path_factory.mktemp("place")
    save_routed(folder / "routed")
    save_tiny_llama(folder / "plain", layers=2, vocab=BYTE_VOCABULARY, tokenizer=True, dtype="bfloat16")
    save_chats(folder / "chats.jsonl")
    return folder


def train(place: Path, model: str, output: Path, *options: object) -> Ended:
    arguments = ("train", place / model, "-o", output, "--data", place / "chats.jsonl", *OPTIONS, *options)
    return run(*arguments, messages=output.with_name(f"{output.name}-messages"))


def test_a_terminated_run_goes_on_to_the_same_end_when_resumed(place: Path, tmp_path: Path) -> None:
    steps = ("--max-steps", 60, "--eval-every", 20)
    whole = train(place, "routed", tmp_path / "whole", *steps, "--json")
    assert whole.returncode == 0, whole.stderr
    output, log = tmp_path / "parts", tmp_path / "parts.run" / "log.jsonl"
    arguments = ("train", place / "routed", "-o", output, "--data", place / "chats.jsonl", *OPTIONS, *steps)
    process = start(arguments, tmp_path / "first")
    while not log.is_file() or log.read_text().count("\n") < 4:
        assert process.is_alive(), ended(process, tmp_path / "first")
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    first = ended(process, tmp_path / "first")
    assert first.returncode == 143, first
    assert "of 60; go on with --resume" in first.stderr
    assert not output.exists()
    assert log.read_text().count("\n") < 60
    again = train(place, "routed", output, *steps, "--json", "--resume")
    assert again.returncode == 0, again.stderr
    assert log_of(tmp_path / "parts.run") == log_of(tmp_path / "whole.run")
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert json.loads(again.stdout) == json.loads(whole.stdout)
    description = json.loads((output / "training.json").read_text())
    assert description["result"]["held_out"]["active_rate"] == json.loads(whole.stdout)["held_out"]["active_rate"]
    assert [file["name"] for file in description["data"]["training"]] == ["chats.jsonl"]
    assert description["settings"]["target"] == 0.7
    # What was trained is what is exported, and proven equal to it.
    artefact = tmp_path / "artefact"
    exported = run("export", output, "-o", artefact, messages=tmp_path / "export")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((artefact / "parity.json").read_text())["verdict"] == "PASS"


@pytest.mark.parametrize(("routers", "routed"), [("add", [True, True]), ("none", False)])
def test_a_plain_model_is_trained_with_new_routers_or_without(
    place: Path, tmp_path: Path, routers: str, routed: object
) -> None:
    result = train(place, "plain", tmp_path / "out", "--max-steps", 2, "--routers", routers)
    assert result.returncode == 0, result.stderr
    assert folder_kind(tmp_path / "out") is FolderKind.TRAINED_CHECKPOINT
    assert folder_kind(tmp_path / "out.run" / "checkpoint-2") is FolderKind.RUN_CHECKPOINT
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("is_dlo", False) == routed
    assert (config["dtype"], config["model_type"]) == ("float32", "llama_dlo_exattn" if routed else "llama")
    exported = run("export", tmp_path / "out", "-o", tmp_path / "artefact", messages=tmp_path / "export")
    assert exported.returncode == 0, exported.stderr


def test_a_plain_model_is_trained_with_routers_of_whole_layers(place: Path, tmp_path: Path) -> None:
    options = ("--max-steps", 2, "--routers", "add", "--routing", "layer")
    result = train(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["is_dlo"]) == ("llama_dlo", [True, True])
    assert config["architectures"] == ["LlamaDloLayerForCausalLM"]
    description = json.loads((tmp_path / "out" / "training.json").read_text())
    assert description["model"]["routing"] == "layer"
    again = train(tmp_path, "out", tmp_path / "more", "--max-steps", 1, "--data", place / "chats.jsonl")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "more" / "config.json").read_text())["model_type"] == "llama_dlo"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("plain", (), "has no routed layer"),
        ("plain", ("--routers", "none", "--routing", "layer"), "--routing layer: --routers none leaves none"),
        ("routed", ("--routing", "layer"), "routing layer was asked for, the model's routers are for routing mlp"),
        ("routed", ("--target", 1.2), "target is 1.2, expected a capacity above 0 and at most 1"),
        ("routed", ("--sequence", 129), "a sequence of 129 tokens is longer than the model's max_position_embeddings"),
        ("routed", ("--sequence", 16), "tokens, a sequence 16"),
        ("routed", ("--resume",), "holds no training run to resume"),
    ],
)
def test_training_refuses_what_cannot_work(
    place: Path, tmp_path: Path, model: str, options: tuple[object, ...], message: str
) -> None:
    result = train(place, model, tmp_path / "out", *options)
    assert (result.returncode, message in result.stderr, "hint:" in result.stderr) == (2, True, True), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()
