"""The dense artefact against the graph of onnxruntime-genai's model builder, on the same ONNX Runtime.

Both are made from the same fp32 Hugging Face folder of SmolLM2-135M. Decode is one token of batch 1 behind 128 tokens,
prefill is 128 tokens. The builder's GroupQueryAttention can append to its cache in place, which is how
onnxruntime-genai runs it; it is measured that way and, like ours, with a cache that grows by one output per step.
Processes of their own, alternating, started anew several times; see benchmarks/common/workers.py.

    python -m benchmarks.dense_speed
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common.measure import print_report, versions
from benchmarks.common.routed_artefact import export
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workers import Worker, alternate_workers
from benchmarks.common.workspace import WORKSPACE

BAR = 1.05
PROMPT = 128
OURS = "dlo-export"
LAUNCHES, BLOCKS = 10, 4
RUNS, SETTLE = {"decode": 20, "prefill": 5}, {"decode": 15, "prefill": 3}


def build_with_genai(model: Path, output: Path, precision: str = "fp32") -> Path:
    """Runs onnxruntime-genai's model builder; returns the graph.

    Args:
        model: Checkpoint folder.
        output: Made.
        precision: "fp32" or "int4".

    Raises:
        RuntimeError: It failed, with what it wrote.
    """
    module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", str(model), "-o", str(output), "-p", precision, "-e", "cpu", "-c", str(output / "cache")]
    built = subprocess.run([*module, *options], check=False, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{module}: ended with {built.returncode}\n{built.stderr[-2000:]}")
    return output / "model.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    model, tokens = smollm2_folder(), distinct_tokens(PROMPT + 1)
    rows, record = [], {}
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        folder = Path(temporary)
        ours, genai = export(model, folder / "ours"), build_with_genai(model, folder / "genai")
        for phase, step, sequence in (("decode", tokens, 1), ("prefill", tokens[:, :PROMPT], PROMPT)):
            np.save(folder / "tokens.npy", step)
            arguments = [folder / "tokens.npy", "--sequence", str(sequence), "--threads", str(threads)]
            worker = functools.partial(Worker, "benchmarks.common.onnxruntime_worker")
            start: dict[str, Callable[[], Worker]] = {
                OURS: functools.partial(worker, ours, *arguments),
                "genai builder, cache in place": functools.partial(worker, genai, *arguments, "--shared-cache"),
                "genai builder, growing cache": functools.partial(worker, genai, *arguments),
            }
            times = alternate_workers(start, launches=LAUNCHES, blocks=BLOCKS, runs=RUNS[phase], settle=SETTLE[phase])
            for name, time in times.items():
                ratio = times[OURS] / time
                rows.append([phase, name, time, *([] if name == OURS else [ratio, f"≤ {BAR}"])])
                record[f"{phase}, {name}"] = {"milliseconds": time.summary(), "ratio": ratio.summary()}
    print_report(
        f"Dense SmolLM2-135M, fp32, {threads} threads",
        ["phase", "graph", "ms", "dlo-export / this", "bar"],
        [[*row, "", ""][:5] for row in rows],
        {
            "dtype": "float32",
            "batch": 1,
            "prompt": PROMPT,
            "launches": LAUNCHES,
            "blocks": BLOCKS,
            "runs": RUNS,
            "warm_up": SETTLE,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai", "torch", "transformers"),
        },
    )


if __name__ == "__main__":
    main()
