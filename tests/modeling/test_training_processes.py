"""`dlo train` in two processes that `accelerate launch` describes to each other, each with a shard of the model."""

import importlib.util
import json
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.numpy import load_file
from torch.distributed.checkpoint import FileSystemReader

from tests.documents import commands
from tests.exporter.forked_commands import Ended, ended, run, start
from tests.modeling.training_runs import log_of, save_chats, save_routed

OPTIONS = ("--sequence", 64, "--batch", 1, "--target", 0.7, "--anneal-steps", 4, "--learning-rate", 1e-3)
STEPS = ("--max-steps", 5, "--eval-every", 3, "--save-every", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed checkpoint, and chats that make an odd number of held-out sequences."""
    return prepared(tmp_path_factory.mktemp("place"))


def prepared(folder: Path, **options: object) -> Path:
    save_routed(folder / "model", **options)
    save_chats(folder / "chats.jsonl")
    return folder


def sharding() -> dict[str, str]:
    """What the documented command puts into the environment for FSDP."""
    (documented,) = [
        command.arguments[2:]
        for command in commands("docs/training.md")
        if command.arguments[0] == "accelerate" and "--use_fsdp" in command.arguments
    ]
    before = dict(os.environ)
    described = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args([*documented]))[0])
    return {name: value for name, value in described.items() if before.get(name) != value and "FSDP" in name}


def start_ranks(arguments: tuple[object, ...], messages: Path, environment: dict[str, str]) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = environment | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            arguments,
            messages.with_name(f"{messages.name}-{rank}"),
            environment={**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]


def ended_ranks(ranks: list, messages: Path) -> list[Ended]:
    for rank in ranks:
        rank.join(timeout=120)
    return [ended(rank, messages.with_name(f"{messages.name}-{number}")) for number, rank in enumerate(ranks)]


def train(place: Path, output: Path, environment: dict[str, str], *options: object) -> list[Ended]:
    arguments = ("train", place / "model", "-o", output, "--data", place / "chats.jsonl", *OPTIONS, *options)
    messages = output.with_name(f"{output.name}-messages")
    return ended_ranks(start_ranks(arguments, messages, environment), messages)


def test_a_sharded_run_is_resumed_and_gathered_into_a_checkpoint_that_is_exported(place: Path, tmp_path: Path) -> None:
    environment = sharding()
    whole = train(place, tmp_path / "whole", environment, *STEPS, "--json")
    assert [rank.returncode for rank in whole] == [0, 0], whole
    # Stopped by what ends a job: every process is told, and each waits for the step's end.
    output, log = tmp_path / "parts", tmp_path / "parts.run" / "log.jsonl"
    arguments = ("train", place / "model", "-o", output, "--data", place / "chats.jsonl", *OPTIONS, *STEPS)
    ranks = start_ranks(arguments, tmp_path / "first", environment)
    while not log.is_file() or not log.read_text():
        assert all(rank.is_alive() for rank in ranks), ended_ranks(ranks, tmp_path / "first")
        time.sleep(0.001)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    first = ended_ranks(ranks, tmp_path / "first")
    assert [rank.returncode for rank in first] == [143, 143], first
    assert not output.exists()
    again = train(place, output, environment, *STEPS, "--json", "--resume")
    assert [rank.returncode for rank in again] == [0, 0], again
    assert log_of(tmp_path / "parts.run") == log_of(tmp_path / "whole.run")
    assert json.loads(again[0].stdout) == json.loads(whole[0].stdout)
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    exported = run("export", output, "-o", tmp_path / "artefact")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "artefact" / "parity.json").read_text())["verdict"] == "PASS"


def rows(checkpoint: Path, part: str) -> dict[str, tuple[int, list[int]]]:
    """By a tensor's name, how many rows it has, and how many of them each process wrote."""
    stored = FileSystemReader(checkpoint / part).read_metadata().state_dict_metadata
    tensors = {name: tensor for name, tensor in stored.items() if getattr(tensor, "size", ())}
    return {name: (tensor.size[0], [chunk.sizes[0] for chunk in tensor.chunks]) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("model", "options", "file"),
    [
        ({"model_type": "llama_dlo_exattn"}, ("--dtype", "bf16"), "model.safetensors"),
        ({"model_type": "llama_dlo"}, ("--gradient-checkpointing",), "model.safetensors"),
        (
            {"routed": None},
            ("--routers", "add", "--routing", "attention", "--mode", "lora", "--as-adapter"),
            "adapter.safetensors",
        ),
    ],
)
def test_shards_train_and_write_what_one_process_does(
    tmp_path: Path, model: dict[str, object], options: tuple[object, ...], file: str
) -> None:
    place = prepared(tmp_path, **model)
    options = (*options, "--max-steps", 3)
    arguments = ("train", place / "model", "-o", tmp_path / "one", "--data", place / "chats.jsonl", *OPTIONS, *options)
    alone = run(*arguments, "--accumulate", 2)
    assert alone.returncode == 0, alone
    together = train(place, tmp_path / "two", sharding(), *options)
    assert [rank.returncode for rank in together] == [0, 0], together
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        found = rows(tmp_path / "two.run" / "checkpoint-3", part)
        assert found
        for name, (every, written) in found.items():
            halves = (every // 2, every - every // 2)  # a router's only row lies in one process
            assert sorted(filter(None, written)) == [*filter(None, halves)], name
    one, two = (log_of(tmp_path / f"{name}.run") for name in ("one", "two"))
    for whole, shards in zip(one, two, strict=True):
        assert shards == pytest.approx(whole, rel=1e-5, abs=1e-7)  # a tenth of what bf16 changes
    weights, gathered = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert gathered.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_allclose(gathered[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ((), {"FSDP_VERSION": "1"}, "FSDP 1 was launched"),
        ((), {}, "this process was launched alone"),
        (("--distill-weight", 1.0), {}, "distill_weight needs a second model"),
    ],
)
def test_sharding_is_refused_before_anything_is_written_when_it_cannot_work(
    place: Path, tmp_path: Path, options: tuple[object, ...], changes: dict[str, str], message: str
) -> None:
    arguments = ("train", place / "model", "-o", tmp_path / "out", "--data", place / "chats.jsonl", *OPTIONS)
    refused = run(*arguments, *options, environment=sharding() | changes)
    assert (refused.returncode, message in refused.stderr, "hint:" in refused.stderr) == (2, True, True), refused
    assert not (tmp_path / "out.run").exists()


def test_deepspeed_is_refused_before_anything_is_written_when_it_is_not_installed(place: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("it is installed here")
    arguments = ("train", place / "model", "-o", tmp_path / "out", "--data", place / "chats.jsonl", *OPTIONS)
    environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
    refused = run(*arguments, environment=environment)
    assert (refused.returncode, "is not installed" in refused.stderr, "hint:" in refused.stderr) == (4, True, True), (
        refused
    )
    assert not (tmp_path / "out.run").exists()
