"""Tokens per second of training steps on one device, and what a step's time goes to.

A Llama of SmolLM2-135M's shapes with random weights, deepened to 36 layers: `dlo train`'s loop with a router on every
layer and without, and transformers' own Trainer, one after the other in one process. A step is everything from one to
the next, data included. `--profile` shows where the time of two routed steps goes, and whether the GPU waited. With
`--turn FILE --of N`, N of these may run at once: they import and compile side by side, for two layers, and time one
after the other once all of them are ready.

    python -m benchmarks.training_rate --device cuda --dtype bf16 [--compile] [--profile] [--steps 12]
    python -m benchmarks.training_rate --tiny --batch 2 --sequence 64                # on any CPU: shows that it runs
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait

# isort: split
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.measure import print_report, versions
from benchmarks.common.training_sides import random_sequences, train_by_trainer
from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.modeling.configuration import LlamaDloConfig
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.packing import PackedSets
from dlo_export.modeling.training.run import train_model
from dlo_export.modeling.training.run_folder import RunFolder
from dlo_export.modeling.training.settings import TrainingSettings

SIDES = ("dlo train, routed", "dlo train, dense", "Trainer, dense")
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
TINY = SMOLLM2 | {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


class Stopwatch:
    """Called behind each step: takes its time, and profiles some.

    Args:
        warm_up: Steps that do not count.
        profiled: Steps to profile behind all that count; 0 for none.
        steps: That count.
    """

    def __init__(self, warm_up: int, steps: int, profiled: int) -> None:
        self.warm_up, self.steps, self.profiled = warm_up, steps, profiled
        self.seconds: list[float] = []
        self.summary: dict[str, Any] | None = None
        self._last = self._last_profiled = time.perf_counter()
        self._count = 0
        self._profile: Any = None

    @property
    def all_steps(self) -> int:
        """How many to train."""
        return self.warm_up + self.steps + self.profiled

    def __call__(self) -> None:
        """A step is over; the trainer has waited for the device to report its loss."""
        now = time.perf_counter()
        self._count += 1
        if self.warm_up < self._count <= self.warm_up + self.steps:
            self.seconds.append(now - self._last)
        if self.profiled and self._count == self.warm_up + self.steps:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.__enter__()
        elif self._profile is not None and self._count == self.all_steps:
            self._profile.__exit__(None, None, None)
            self.summary = summarised(self._profile, time.perf_counter() - self._last_profiled, self.profiled)
        self._last = time.perf_counter()
        if self._count == self.warm_up + self.steps:
            self._last_profiled = self._last


def summarised(profiled: Any, seconds: float, steps: int) -> dict[str, Any]:
    """Where the time of profiled steps went, milliseconds a step; a busy share far below 1 is a GPU that waits."""
    averages = profiled.key_averages()
    on_gpu = [
        event
        for event in averages
        if str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    ]
    busy = sum(event.self_device_time_total for event in on_gpu)
    kernels = sorted(on_gpu, key=lambda event: -event.self_device_time_total)[:20]
    waits = [event for event in averages if event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize")]
    operators = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:8]
    each = 1e-3 / steps
    return {
        "step_ms": round(1e3 * seconds / steps, 2),
        "gpu_busy_share": round(busy / 1e6 / seconds, 3),
        "kernels_a_step": sum(event.count for event in on_gpu) // steps,
        "waits_a_step": sum(event.count for event in waits) / steps,
        "kernels_ms": [[event.key[:90], round(event.self_device_time_total * each, 3)] for event in kernels],
        "cpu_ms": {event.key[:50]: round(event.self_cpu_time_total * each, 2) for event in operators},
    }


def train_ours(shapes: dict[str, Any], settings: TrainingSettings, watch: Stopwatch, *, routed: bool) -> None:
    """Trains as `dlo train` does."""
    layers = shapes["num_hidden_layers"]
    routing = routed_config([True] * layers) if routed else {}
    named = ("model_type", "architectures")
    config = LlamaDloConfig(**shapes, **{key: value for key, value in routing.items() if key not in named})
    with torch.device(settings.device):
        model = LlamaDloForCausalLM(config)
    data = random_sequences(settings, config.vocab_size, settings.batch * watch.all_steps)
    few = random_sequences(settings, config.vocab_size, settings.batch)
    with tempfile.TemporaryDirectory() as run:
        train_model(
            model,
            settings,
            PackedSets(data, few),
            folder=RunFolder(Path(run), resumable=False),
            description={},
            report=lambda _report: watch(),
        )


def train_theirs(shapes: dict[str, Any], settings: TrainingSettings, watch: Stopwatch) -> None:
    """Trains the dense model by transformers' Trainer alone."""
    with torch.device(settings.device):
        model = LlamaForCausalLM(LlamaConfig(**shapes))
    data = random_sequences(settings, model.config.vocab_size, settings.batch * watch.all_steps)
    with tempfile.TemporaryDirectory() as run:
        train_by_trainer(model, settings, data, Path(run), watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="two more routed steps under PyTorch's profiler")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: only shows that all of it runs")
    parser.add_argument("--turn", type=Path, help="lock file, shared by those that must not time at once")
    parser.add_argument("--of", type=int, default=1, help="so many share it")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="sequences of a step; each in turn")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch_device(arguments.device)  # or says why it cannot be had
    shapes = TINY if arguments.tiny else SMOLLM2
    lines: list[dict[str, Any]] = []
    for batch, side in itertools.product(arguments.batch, arguments.sides):
        if arguments.turn is not None and arguments.compile:
            # What is compiled for two layers serves all, and two hardly show in what others time meanwhile.
            few = {**shapes, "num_hidden_layers": 2}
            _train(side, few, _settings(arguments, batch, 2), Stopwatch(1, 1, 0))
        profiled = 2 if arguments.profile and side == SIDES[0] else 0
        watch = Stopwatch(arguments.warm_up, arguments.steps, profiled)
        with _turn(arguments.turn, arguments.of):
            start = time.perf_counter()
            _train(side, shapes, _settings(arguments, batch, watch.all_steps), watch)
            # A line for each side, at once: whoever stops this has what was measured before.
            lines.append(_line(arguments, batch, side, watch, time.perf_counter() - start))
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    print_report(
        f"Training rate, {arguments.device}, {arguments.dtype}{', compiled' if arguments.compile else ''}",
        ["side", "sequences of tokens", "step, ms", "tokens/s"],
        [
            [line["side"], " of ".join(map(str, line["batch"])), line["step_ms"]["median"], line["tokens_per_second"]]
            for line in lines
        ],
        {
            "steps": arguments.steps,
            "warm_up": arguments.warm_up,
            "sides": lines,
            "versions": versions("dlo-export", "torch", "transformers"),
        },
    )


@contextlib.contextmanager
def _turn(file: Path | None, number: int) -> Iterator[None]:
    """Alone among those that ask for the same file, and after all of them have asked, or some did not in time."""
    if file is None:
        yield
        return
    with file.open("a") as lock:
        lock.write("ready\n")
        lock.flush()
        until = time.monotonic() + _WAIT_FOR_OTHERS_S
        while len(file.read_text().splitlines()) < number and time.monotonic() < until:
            time.sleep(0.05)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    time.sleep(_LET_OTHERS_S)


def _settings(arguments: argparse.Namespace, batch: int, steps: int) -> TrainingSettings:
    return TrainingSettings(
        target=0.8,
        anneal_steps=0,
        selection="threshold",
        max_steps=steps,
        batch=batch,
        sequence=arguments.sequence,
        dtype=arguments.dtype,
        device=arguments.device,
        compile=arguments.compile,
        exact_rate=False,
        eval_every=1_000_000,
        save_every=1_000_000,
    )


def _train(side: str, shapes: dict[str, Any], settings: TrainingSettings, watch: Stopwatch) -> None:
    if side == SIDES[2]:
        train_theirs(shapes, settings, watch)
    else:
        train_ours(shapes, settings, watch, routed=side == SIDES[0])


def _line(arguments: argparse.Namespace, batch: int, side: str, watch: Stopwatch, seconds: float) -> dict[str, Any]:
    taken = np.array(watch.seconds)
    on_gpu = torch.cuda.is_available()
    return {
        "benchmark": "training_rate",
        "side": side,
        "compile": arguments.compile,
        "dtype": arguments.dtype,
        "batch": [batch, arguments.sequence],
        "steps": len(taken),
        "step_ms": {name: round(1e3 * float(np.quantile(taken, at)), 2) for name, at in _QUANTILES.items()},
        "tokens_per_second": round(batch * arguments.sequence / float(np.median(taken))),
        "all_s": round(seconds, 1),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        "card": torch.cuda.get_device_name() if on_gpu else None,
        "profile": watch.summary,
    }


_WAIT_FOR_OTHERS_S = 25.0
_LET_OTHERS_S = 0.2  # whoever waits for a turn is slower to take it than whoever just had it
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


if __name__ == "__main__":
    main()
