"""Tokens per second of `dlo train`'s loop against transformers' own Trainer on the same model without routers.

SmolLM2-135M deepened by TLI from 30 to 36 layers. One side has a router on every layer and trains as `dlo train` does,
the other is transformers' LlamaForCausalLM in a plain Trainer: same weights, sequences, optimiser and arguments. Each
is in a process of its own; blocks of steps alternate. A step is everything from one to the next, data included;
evaluations and checkpoints are not part of it on either side.

    python -m benchmarks.training_speed [--quick] [--cpu-time --threads 1] [--dtype bf16] [--compile]
    python -m benchmarks.training_speed --device cuda --dtype bf16 --batch 16 --sequence 1024
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait

# isort: split
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.foreign_load import ForeignLoad
from benchmarks.common.measure import Samples, alternate, print_report, versions
from benchmarks.common.random_llama import random_llama_folder
from benchmarks.common.smollm2 import smollm2_folder
from benchmarks.common.training_sides import random_sequences, train_by_trainer
from benchmarks.common.workers import Worker, serve
from dlo_export.checkpoints.depth.expansion import expanded_config, expanded_tensors, placements, routed_config
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.packing import PackedSets
from dlo_export.modeling.training.run import train_model
from dlo_export.modeling.training.run_folder import RunFolder
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.untrained_routers import UntrainedRoutersWarning

BAR = 0.9
SIDES = ("dlo train", "Trainer, no routers")
SEQUENCES = 64
QUICK_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


class Steps:
    """Training in a thread, which goes on by one step whenever this is called.

    Args:
        train: Trains; calls what it is given after each step.
    """

    def __init__(self, train: Callable[[Callable[[], None]], object]) -> None:
        self._may_go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None

        def run() -> None:
            self._may_go.acquire()
            try:
                train(self._stepped)
            except BaseException as error:  # raised where the step is waited for
                self._error = error
            self._done.release()

        threading.Thread(target=run, daemon=True).start()

    def __call__(self) -> None:
        """Returns when the step is done."""
        self._may_go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _stepped(self) -> None:
        self._done.release()
        self._may_go.acquire()


def deepened_model(folder: Path, *, routed: bool) -> LlamaDloForCausalLM:
    """The checkpoint with a new layer after every five, and an all-zero router on each if asked for."""
    with open_checkpoint(folder) as checkpoint:
        plan = placements("tli", checkpoint.config.num_layers, every=5)
        config = checkpoint.config.raw | expanded_config(checkpoint.config.raw, plan)
        tensors = expanded_tensors(checkpoint.tensors, plan)
        if routed:
            config |= routed_config([True] * plan.num_layers)
            zeros = ArrayTensor(np.zeros((1, config["hidden_size"]), np.float32))
            tensors |= {router_name(layer): zeros for layer in range(plan.num_layers)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedRoutersWarning)  # they are about to be trained
            return llama_dlo_from_tensors(config, tensors)


def plain_model(folder: Path) -> LlamaForCausalLM:
    """The same weights in transformers' own class."""
    model = deepened_model(folder, routed=False)
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    plain = LlamaForCausalLM(LlamaConfig(**values))
    plain.load_state_dict(model.state_dict())
    return plain


def train_routed(folder: Path, settings: TrainingSettings, run: Path, stepped: Callable[[], None]) -> None:
    """As `dlo train` does."""
    model = deepened_model(folder, routed=True)
    data = random_sequences(settings, model.config.vocab_size, SEQUENCES)
    train_model(
        model,
        settings,
        PackedSets(data, data),
        folder=RunFolder(run),
        description={},
        report=lambda _report: stepped(),
    )


def train_plain(folder: Path, settings: TrainingSettings, run: Path, stepped: Callable[[], None]) -> None:
    """By transformers' Trainer alone."""
    model = plain_model(folder)
    train_by_trainer(model, settings, random_sequences(settings, model.config.vocab_size, SEQUENCES), run, stepped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small random model: only shows that all of it runs")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument(
        "--cpu-time", action="store_true", help="not wall time: for machines others use; with one thread"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="be the process that trains it")
    arguments = parser.parse_args()
    torch_device(arguments.device)  # or says why it cannot be had, before anything is written
    quick = arguments.quick
    settings = TrainingSettings(
        max_steps=1_000_000,
        batch=arguments.batch,
        sequence=min(256, arguments.sequence) if quick else arguments.sequence,
        dtype=arguments.dtype,
        device=arguments.device,
        compile=arguments.compile,
        eval_every=1_000_000,
        save_every=1_000_000,
    )
    folder = random_llama_folder("quick-training", QUICK_MODEL) if quick else smollm2_folder()
    if arguments.side is not None:
        torch.set_num_threads(arguments.threads)
        train = train_routed if arguments.side == SIDES[0] else train_plain
        with tempfile.TemporaryDirectory() as run:
            steps = Steps(functools.partial(train, folder, settings, Path(run)))
            serve(steps, {}, clock=time.process_time if arguments.cpu_time else time.perf_counter)
        return

    blocks = 3 if quick else arguments.blocks
    given = [part for name, value in vars(arguments).items() for part in _as_option(name, value)]
    load = ForeignLoad()
    with contextlib.ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker("benchmarks.training_speed", *given, "--side", side)) for side in SIDES
        }
        for worker in workers.values():
            worker(2 if not settings.compile else 4)
        times = alternate(workers, blocks=blocks, runs=1, settle=0)
    tokens = settings.batch * settings.sequence
    ratio = times[SIDES[1]] / times[SIDES[0]]
    speeds = {side: 1000 * tokens / times[side].median for side in SIDES}
    print_report(
        f"Training {'a small random model' if quick else 'SmolLM2-135M, 36 layers'}, {settings.dtype}",
        ["", "s per step", "tokens/s"],
        [[side, Samples(times[side].values / 1000), f"{speeds[side]:.0f}"] for side in SIDES]
        + [["ratio of speeds", ratio, f"≥ {BAR}"]],
        {
            "settings": dataclasses.asdict(settings),
            "clock": "cpu" if arguments.cpu_time else "wall",
            "threads": arguments.threads,
            "blocks": blocks,
            "milliseconds": {side: times[side].summary() for side in SIDES},
            "tokens_per_second": {side: round(speed, 1) for side, speed in speeds.items()},
            "ratio": ratio.summary(),
            "foreign_load": round(load.share(), 2),
            "passed": ratio.median >= BAR,
            "versions": versions("dlo-export", "torch", "transformers", "accelerate"),
        },
    )


def _as_option(name: str, value: object) -> list[str]:
    if value is None or value is False:
        return []
    option = f"--{name.replace('_', '-')}"
    return [option] if value is True else [option, str(value)]


if __name__ == "__main__":
    main()
