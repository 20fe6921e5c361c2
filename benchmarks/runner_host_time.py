"""What our ONNX Runtime runners cost the host: processor time of a token and a prompt, in a model of next to no work.

    python -m benchmarks.runner_host_time [--before CHECKOUT] [--rounds 6]

A random model of 8 layers, hidden size 64 and a vocabulary of 32,000, float32, on a CPU with one thread; outputs are
kept where the provider computes and read back, as on a GPU: a prompt of 128 tokens, then 64 greedy ones. With --before,
the same by the runners of another checkout, in processes that take turns. Time is the thread's own; the model's part of
it is the same on both sides. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common.measure import Samples, print_report
from benchmarks.common.random_llama import H2048, RandomTensor
from dlo_export.checkpoints.checkpoint_folder import save_model_tensors
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.onnxruntime.in_place_runner import InPlaceRunner
from dlo_export.runtimes.onnxruntime.providers import CPU
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.runner import Runner

PROMPT, TOKENS, GENERATIONS, VOCABULARY = 128, 64, 5, 32_000
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GRAPHS: Mapping[str, int | None] = {"growing cache": None, "cache in place": 512}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, whose runners are measured beside these")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--graphs", type=Path, help=argparse.SUPPRESS)  # of a process of its own
    options = parser.parse_args(arguments)
    if options.graphs is not None:
        print(json.dumps(measured(options.graphs)), flush=True)
        return
    here = Path(__file__).parents[1]
    checkouts = {"now": here} if options.before is None else {"before": options.before.absolute(), "now": here}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        save_graphs(Path(folder))
        for round_ in range(options.rounds):
            for name in checkouts if round_ % 2 == 0 else reversed(list(checkouts)):
                command = [sys.executable, __file__, "--graphs", folder]
                environment = {**os.environ, "PYTHONPATH": str(checkouts[name])}
                said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                found[name].append(json.loads(said.splitlines()[-1]))
    samples = {
        name: {what: Samples(np.array([values[what] for values in rounds])) for what in rounds[0]}
        for name, rounds in found.items()
    }
    ratios = {what: samples["now"][what] / samples["before"][what] for what in samples["now"] if "before" in samples}
    rows = [
        (what, *(str(samples[name][what]) for name in samples), *([str(ratios[what])] if ratios else []))
        for what in samples["now"]
    ]
    facts = {name: {what: figure.summary() for what, figure in figures.items()} for name, figures in samples.items()}
    facts |= {"now_over_before": {what: ratio.summary() for what, ratio in ratios.items()}}
    print_report("runner_host_time", ("what", *samples, *(["ratio"] if ratios else [])), rows, facts)


def save_graphs(folder: Path) -> None:
    """Exports the model with either cache."""
    config = {**H2048, **SMALL, "vocab_size": VOCABULARY}
    model = folder / "model"
    model.mkdir()
    shapes = LlamaConfig.from_dict(config, "model").tensor_shapes()
    save_model_tensors({name: RandomTensor(name, shape) for name, shape in shapes.items()}, model)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, slots in GRAPHS.items():
        request = ExportRequest(str(model), folder / name, dtype="fp32", parity=False, static_cache=slots)
        export_model(request, Reporter())


def measured(folder: Path) -> dict[str, float]:
    """Processor time of this checkout's runners: microseconds of a token, milliseconds of a prompt; medians."""
    kept = dataclasses.replace(CPU, reads_back=True)
    runners: dict[str, Runner] = {
        "growing cache": OnnxRuntimeRunner(folder / "growing cache" / "model.onnx", threads=1, provider=kept),
        "cache in place": InPlaceRunner(folder / "cache in place" / "model.onnx", threads=1),
    }
    found = {}
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, (1, PROMPT))
    for name, runner in runners.items():
        prompts: list[float] = []
        tokens: list[float] = []
        for _ in range(1 + GENERATIONS):
            runner.reset(1)
            fed = prompt
            for length in range(PROMPT, PROMPT + TOKENS + 1):
                positions = np.arange(length - fed.shape[1], length)[np.newaxis]
                begin = time.thread_time()
                logits = runner.step(fed, np.ones((1, length), np.int64), positions, last_logits=True).logits
                (tokens if fed.shape[1] == 1 else prompts).append(time.thread_time() - begin)
                fed = logits[:, -1].argmax(-1)[:, np.newaxis]
        found[f"{name}, us of a token"] = float(np.median(tokens[TOKENS:])) * 1e6
        found[f"{name}, ms of the prompt"] = float(np.median(prompts[1:])) * 1e3
        runner.close()
    return found


if __name__ == "__main__":
    main()
