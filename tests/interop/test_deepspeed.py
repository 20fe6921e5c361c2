"""`dlo train` in two processes that DeepSpeed shards the model among, on CPUs: what it trains, keeps and writes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.common.workspace import WORKSPACE
from tests.documents import ROOT, commands
from tests.exporter.forked_commands import run
from tests.interop.environments import SHARDER, SHARDER_REQUIREMENTS, is_installed
from tests.modeling.training_runs import log_of, save_chats, save_routed

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        not is_installed(SHARDER, SHARDER_REQUIREMENTS),
        reason="python -m tests.interop.environments has not installed it",
    ),
]

DLO = ROOT / "tests" / "interop" / "launched" / "dlo.py"
OPTIONS = ("--sequence", 64, "--batch", 1, "--target", 0.7, "--anneal-steps", 4, "--learning-rate", 1e-3)
STEPS = ("--max-steps", 5, "--eval-every", 3, "--save-every", 2)


def launched(stage: int, arguments: tuple[object, ...], messages: Path) -> subprocess.Popen:
    """Starts the documented command in two processes, which write to files."""
    (documented,) = [
        command.arguments[2 : command.arguments.index("train") - 1]
        for command in commands("docs/training.md")
        if "--use_deepspeed" in command.options
    ]
    launch = [*documented, "--num_processes", 2, "--num_machines", 1, "--zero_stage", stage, "--main_process_port", 0]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = WORKSPACE / SHARDER / "bin"
    with messages.with_suffix(".out").open("w") as out, messages.with_suffix(".err").open("w") as err:
        return subprocess.Popen(
            [program / "python", program / "accelerate", "launch", *map(str, launch), DLO, *map(str, arguments)],
            stdout=out,
            stderr=err,
            env=environment,
        )


def train(place: Path, output: Path, stage: int, *options: object) -> str:
    """What a run says that comes to its end."""
    arguments = ("train", place / "model", "-o", output, "--data", place / "chats.jsonl", *OPTIONS, *options)
    messages = output.with_name(f"{output.name}-messages")
    code = launched(stage, arguments, messages).wait(timeout=600)
    assert code == 0, messages.with_suffix(".err").read_text()
    return messages.with_suffix(".out").read_text()


@pytest.mark.parametrize(
    ("stage", "model_type", "options"),
    [
        (2, "llama_dlo_exattn", ()),
        (3, "llama_dlo", ("--dtype", "bf16", "--gradient-checkpointing")),
        (3, "llama_dlo_exattn", ("--mode", "lora")),
    ],
)
def test_a_run_trains_as_one_process_does_when_deepspeed_shards_stops_and_resumes_it(
    tmp_path: Path, stage: int, model_type: str, options: tuple[object, ...]
) -> None:
    save_routed(tmp_path / "model", model_type=model_type)
    save_chats(tmp_path / "chats.jsonl")
    options = (*STEPS, *options)
    arguments = ("train", tmp_path / "model", "-o", tmp_path / "one", "--data", tmp_path / "chats.jsonl", *OPTIONS)
    alone = run(*arguments, *options, "--accumulate", 2, "--json")
    assert alone.returncode == 0, alone.stderr
    output, log = tmp_path / "two", tmp_path / "two.run" / "log.jsonl"
    arguments = ("train", tmp_path / "model", "-o", output, "--data", tmp_path / "chats.jsonl", *OPTIONS, *options)
    first = launched(stage, arguments, tmp_path / "first")
    while not log.is_file() or not log.read_text():
        assert first.poll() is None, (tmp_path / "first.err").read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)  # the launcher passes it on
    first.wait(timeout=120)
    assert not output.exists()
    assert "go on with --resume" in (tmp_path / "first.err").read_text()
    reported = json.loads(train(tmp_path, output, stage, *options, "--json", "--resume"))
    assert reported["rate_control"]["after"] == pytest.approx(json.loads(alone.stdout)["rate_control"]["after"])
    for whole, shards in zip(log_of(tmp_path / "one.run"), log_of(tmp_path / "two.run"), strict=True):
        # An epoch's last step may be of fewer micro-batches where there are two processes.
        assert shards | {"epoch": 0} == pytest.approx(whole | {"epoch": 0}, rel=1e-5, abs=1e-7)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    exported = run("export", output, "-o", tmp_path / "artefact")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "artefact" / "parity.json").read_text())["verdict"] == "PASS"


def test_a_diverging_run_names_step_and_layer_when_deepspeed_would_have_taken_the_step(tmp_path: Path) -> None:
    save_routed(tmp_path / "model")
    save_chats(tmp_path / "chats.jsonl")
    arguments = ("train", tmp_path / "model", "-o", tmp_path / "out", "--data", tmp_path / "chats.jsonl", *OPTIONS)
    # The first step's rate is 0: warming up, so the second one spoils the weights.
    fast = ("--max-steps", 6, "--learning-rate", 1e14, "--warmup", 0.5, "--save-every", 1, "--uniform")
    process = launched(2, (*arguments, *fast), tmp_path / "messages")
    assert process.wait(timeout=600) != 0
    said = (tmp_path / "messages.err").read_text()
    assert "training: the loss of step 3 is not a finite number: layer" in said, said
    assert "checkpoint-2 in" in said
    assert not (tmp_path / "out").exists()
