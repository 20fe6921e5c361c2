import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dlo_export.checkpoints.files.folder_kind import FolderKind, folder_kind
from dlo_export.checkpoints.files.written_files import LIST_NAME
from dlo_export.exporter.sources.source import open_source
from dlo_export.modeling.training.settings import TrainingSettings
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
    (folder / "text.txt").write_text("What a router lets through, and what it does not, is read off a text. " * 40)
    return folder


def train(place: Path, model: str, output: Path, *options: object, **limits: Any) -> Ended:
    arguments = ("train", place / model, "-o", output, "--data", place / "chats.jsonl", *OPTIONS, *options)
    return run(*arguments, **limits)


def digests(folder: Path) -> dict[str, str]:
    """Of every file but a checkpoint's list, which has times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LIST_NAME]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    digest = hashlib.sha256((place / "chats.jsonl").read_bytes()).hexdigest()
    assert description["data"] == {"training": [{"name": "chats.jsonl", "sha256": digest}]}
    assert description["settings"].keys() == {field.name for field in dataclasses.fields(TrainingSettings)}
    assert description["settings"]["target"] == 0.7
    assert description["versions"].keys() >= {"dlo-export", "torch", "transformers", "accelerate", "python"}
    control = description["result"]["rate_control"]
    assert control == json.loads(whole.stdout)["rate_control"]
    assert (control["target"], control["other_text"]) == (0.7, False)  # one held-out sequence
    config = json.loads((output / "config.json").read_text())
    assert control["thresholds"] == config.get("router_thresholds", {})
    assert config["model_type"] == "llama_dlo_exattn" + ("_thresholds" if control["thresholds"] else "")
    # What was trained is what is exported, and proven equal to it.
    artefact = tmp_path / "artefact"
    exported = run("export", output, "-o", artefact)
    assert exported.returncode == 0, exported.stderr
    assert json.loads((artefact / "parity.json").read_text())["verdict"] == "PASS"


@pytest.mark.parametrize(("routers", "routed"), [("add", [True, True]), ("none", False)])
def test_a_plain_model_is_trained_with_new_routers_or_without(
    place: Path, tmp_path: Path, routers: str, routed: object
) -> None:
    other = place / "text.txt"
    options = ("--max-steps", 2, "--routers", routers, "--trained-rate", "--other-text", other)
    result = train(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "out" / "training.json").read_text())["result"]["other_text"][str(other)]
    assert f"{other}: perplexity {measured['perplexity']:.2f}" in result.stdout
    for name in ("held-out text", str(other)):
        assert (f"{name}: " in result.stderr and "the target is 70%" in result.stderr) == (routers == "add")
    assert folder_kind(tmp_path / "out") is FolderKind.TRAINED_CHECKPOINT
    assert folder_kind(tmp_path / "out.run" / "checkpoint-2") is FolderKind.RUN_CHECKPOINT
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("is_dlo", False) == routed
    assert (config["dtype"], config["model_type"]) == ("float32", "llama_dlo_exattn" if routed else "llama")
    exported = run("export", tmp_path / "out", "-o", tmp_path / "artefact")
    assert exported.returncode == 0, exported.stderr


def test_a_plain_model_is_trained_with_routers_of_whole_layers(place: Path, tmp_path: Path) -> None:
    options = ("--max-steps", 2, "--routers", "add", "--routing", "layer", "--trained-rate")
    result = train(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["is_dlo"]) == ("llama_dlo", [True, True])
    assert config["architectures"] == ["LlamaDloLayerForCausalLM"]
    description = json.loads((tmp_path / "out" / "training.json").read_text())
    assert description["model"]["routing"] == "layer"
    again = train(
        tmp_path, "out", tmp_path / "more", "--max-steps", 1, "--data", place / "chats.jsonl", "--trained-rate"
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "more" / "config.json").read_text())["model_type"] == "llama_dlo"


@pytest.mark.parametrize("routing", ["attention", "attention-active"])
def test_a_model_is_exported_and_measured_when_it_was_trained_to_skip_attention(
    place: Path, tmp_path: Path, routing: str
) -> None:
    options = ("--max-steps", 4, "--routers", "add", "--routing", routing, "--learning-rate", 0.01)
    result = train(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {"attention": "all", "attention-active": "active"}[routing]
    assert (config["model_type"], config["attention_routing_kv"]) == ("llama_dlo_attn", kept)
    exported = run("export", tmp_path / "out", "-o", tmp_path / "artefact")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "artefact" / "parity.json").read_text())["verdict"] == "PASS"
    sizes = ("--prompt-tokens", 8, "--decode-tokens", 2, "--rounds", 1, "--text", place / "text.txt")
    measured = run("bench", tmp_path / "artefact", *sizes, "--json")
    assert measured.returncode == 0, measured.stderr
    assert 0 < json.loads(measured.stdout)["artefacts"][0]["active_rate"]["original"] < 1


@pytest.mark.parametrize("mode", ["lora", "routers"])
def test_an_adapter_makes_the_trained_model_when_training_wrote_one(place: Path, tmp_path: Path, mode: str) -> None:
    options = ("--mode", mode, "--max-steps", 3, "--routers", "add", "--learning-rate", 0.01, "--target", 0.6)
    for name, more in (("whole", ()), ("adapter", ("--as-adapter",))):
        result = train(place, "plain", tmp_path / name, *options, *more)
        assert result.returncode == 0, result.stderr
    assert folder_kind(tmp_path / "adapter") is FolderKind.ADAPTER
    assert (tmp_path / "adapter" / "lora").exists() == (mode == "lora")
    source = open_source(place / "plain", tmp_path / "adapter")
    try:
        made = {name: tensor.numpy() for name, tensor in source.tensors().items()}
        assert source.adapter_base == "same"
        assert source.adapter is not None
        thresholds = source.adapter.router_thresholds
    finally:
        source.close()
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    plain = load_file(place / "plain" / "model.safetensors")
    assert made.keys() == whole.keys()
    for name, values in whole.items():
        if name in plain:
            # LoRA's matrices are stored in 16 bits: what they change is as near as that.
            np.testing.assert_allclose(made[name], values, atol=2e-3 * abs(values - plain[name]).max(), err_msg=name)
        else:
            np.testing.assert_array_equal(made[name], values, err_msg=name)
    assert any((whole[name] != values).any() for name, values in plain.items()) == (mode == "lora")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert {str(layer): value for layer, value in thresholds.items()} == config.get("router_thresholds", {})
    exported = run(
        *("export", place / "plain", "--adapter", tmp_path / "adapter", "-o", tmp_path / "artefact"),
    )
    assert exported.returncode == 0, exported.stderr
    if mode == "lora":  # another rate is another adapter, with the same matrices
        sizes = ("--text", place / "text.txt", "--tokens", 512, "--evaluation-tokens", 512)
        calibrated = ("calibrate", place / "plain", "--adapter", tmp_path / "adapter", "-o", tmp_path / "moved")
        moved = run(*calibrated, "--retarget", 0.8, *sizes)
        assert moved.returncode == 0, moved.stderr
        source = open_source(place / "plain", tmp_path / "moved")
        try:
            assert source.adapter_base == "same"
            assert source.adapter is not None
            assert source.adapter.router_thresholds not in ({}, thresholds)
            for name, tensor in source.tensors().items():
                np.testing.assert_array_equal(tensor.numpy(), made[name], err_msg=name)
        finally:
            source.close()
    again = train(place, "plain", tmp_path / "again", *options, "--adapter", tmp_path / "adapter", "--as-adapter")
    assert again.returncode == (2 if mode == "lora" else 0), again.stderr
    assert ("the adapter has LoRA matrices already" in again.stderr) == (mode == "lora")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("plain", (), "has no routed layer"),
        ("plain", ("--as-adapter", "--routers", "add"), "--as-adapter: mode full trains whole weights"),
        ("plain", ("--as-adapter", "--mode", "lora", "--routers", "none"), "--routers none leaves no router"),
        ("routed", ("--as-adapter", "--mode", "lora"), "has routers of its own"),
        ("plain", ("--routers", "none", "--routing", "layer"), "--routing layer: --routers none leaves none"),
        ("routed", ("--routing", "layer"), "routing layer was asked for, the model's routers are for routing mlp"),
        ("routed", ("--target", 0), "target is 0.0, expected a capacity above 0 and at most 1"),
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


STEPS = ("--max-steps", 6, "--save-every", 2)
GOOD = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'


@pytest.fixture(scope="module")
def begun(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, its result, and the same run as if it had been killed in its fifth step."""
    folder = tmp_path_factory.mktemp("begun")
    whole = train(place, "routed", folder / "whole", *STEPS)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(folder / "whole.run", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoint-6")
    shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)
    return folder


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ("routed", GOOD + "{", (), "line 2: is not JSON"),
        ("routed", "\n", (), "data.jsonl: is empty"),
        ("routed", GOOD + '{"messages": [{"role": "user", "content": "x"}]}', (), "line 2: has no assistant turn"),
        ("routed", GOOD * 3, (), "the run to resume was started otherwise:\n  data.training"),
        ("routed", None, ("--sequence", 16), "tokens, a sequence 16"),
        ("routed", None, ("--target", -1), "target is -1.0, expected a capacity above 0 and at most 1"),
        ("routed", None, ("--learning-rate", 0.5), "settings.learning_rate is 0.5, was 0.001"),
        ("plain", None, (), "has no routed layer"),
        ("plain", None, ("--routers", "add"), "the run to resume was started otherwise:\n  model.routers"),
    ],
)
def test_a_run_is_left_as_it_is_when_it_cannot_be_resumed(
    place: Path, begun: Path, tmp_path: Path, model: str, data: str | None, options: tuple[object, ...], message: str
) -> None:
    shutil.copytree(begun / "run", tmp_path / "out.run")
    before = digests(tmp_path / "out.run")
    if data is not None:
        (tmp_path / "data.jsonl").write_text(data)
        options = (*options, "--data", tmp_path / "data.jsonl")
    result = train(place, model, tmp_path / "out", *STEPS, "--resume", *options)
    assert (result.returncode, message in result.stderr, "hint:" in result.stderr) == (2, True, True), result.stderr
    assert "Traceback" not in result.stderr
    assert digests(tmp_path / "out.run") == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file_bytes", [2_500, 100_000])
def test_a_run_goes_on_from_its_last_checkpoint_when_the_disk_was_full(
    place: Path, begun: Path, tmp_path: Path, file_bytes: int
) -> None:
    """The smaller limit is the log's, the larger one the checkpoint's."""
    shutil.copytree(begun / "run", tmp_path / "out.run")
    before = digests(tmp_path / "out.run" / "checkpoint-4")
    full = train(place, "routed", tmp_path / "out", *STEPS, "--resume", limits={"file_bytes": file_bytes})
    assert (full.returncode, "File too large" in full.stderr, "hint:" in full.stderr) == (4, True, True), full.stderr
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.run").glob("*checkpoint*")] == ["checkpoint-4"]
    assert digests(tmp_path / "out.run" / "checkpoint-4") == before
    again = train(place, "routed", tmp_path / "out", *STEPS, "--resume")
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "out") == digests(begun / "whole")
    assert log_of(tmp_path / "out.run") == log_of(begun / "whole.run")


def test_a_diverging_command_names_step_and_layer_and_keeps_its_last_checkpoint(place: Path, tmp_path: Path) -> None:
    # The first step's rate is 0: warming up, so the second one spoils the weights.
    fast = ("--learning-rate", 1e14, "--warmup", 0.5, "--save-every", 1, "--uniform")
    result = train(place, "routed", tmp_path / "out", *STEPS, *fast)
    assert result.returncode == 2, result.stderr
    assert re.search(r"training: the loss of step 3 is not a finite number: layer \d is the first", result.stderr)
    assert "hint: lower the learning rate; checkpoint-2 in" in result.stderr
    for name in ("checkpoint-1", "checkpoint-2"):
        weights = load_file(tmp_path / "out.run" / name / "model.safetensors")
        assert all(np.isfinite(values).all() for values in weights.values())
    assert not (tmp_path / "out").exists()
