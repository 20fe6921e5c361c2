"""The dense artefact against the graph of onnxruntime-genai's model builder, on the same ONNX Runtime.

Both are made from the same fp32 Hugging Face folder of SmolLM2-135M. Decode is one token of batch 1 behind 128 tokens
(`--prompt`), prefill is as many. The builder's GroupQueryAttention can append to its cache in place, which is how
onnxruntime-genai runs it, and so does ours of `--static-cache`; without, ours has a cache that grows by one output per
step, and the builder's is measured with such a one too. What grows is copied in every step.

Processes of their own, alternating, started anew several times; see benchmarks/common/workers.py.

    python -m benchmarks.dense_speed
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measure import print_report, versions
from benchmarks.common.routed_artefact import export
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workers import Worker, alternate_workers
from benchmarks.common.workspace import temporary_folder

BAR = 1.0
PROMPT = 128
OURS, OURS_IN_PLACE = "dlo-export", "dlo-export --static-cache"
GENAI_IN_PLACE, GENAI_GROWING = "genai builder, cache in place", "genai builder, growing cache"
COMPARED = ((OURS, GENAI_GROWING), (OURS, GENAI_IN_PLACE), (OURS_IN_PLACE, GENAI_IN_PLACE))
LAUNCHES, BLOCKS = 8, 4
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
    parser.add_argument("--phase", choices=tuple(RUNS), nargs="+", default=tuple(RUNS))
    parser.add_argument("--prompt", type=int, default=PROMPT, help="Tokens of prefill, and in front of a decode step.")
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--busy", action="store_true", help="Take the machine as it is, other programs included.")
    given = parser.parse_args()
    threads = given.threads
    model, tokens = smollm2_folder(), distinct_tokens(given.prompt + 1)
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    with temporary_folder() as folder:
        ours, genai = export(model, folder / "ours"), build_with_genai(model, folder / "genai")
        in_place = export(model, folder / "in place", static_cache=given.prompt + 1)
        steps = {"decode": (tokens, 1), "prefill": (tokens[:, :-1], given.prompt)}
        for phase in given.phase:
            step, sequence = steps[phase]
            np.save(folder / "tokens.npy", step)
            arguments = [folder / "tokens.npy", "--sequence", str(sequence), "--threads", str(threads)]
            worker = functools.partial(Worker, "benchmarks.common.onnxruntime_worker")
            start: dict[str, Callable[[], Worker]] = {
                OURS: functools.partial(worker, ours, *arguments),
                OURS_IN_PLACE: functools.partial(worker, in_place, *arguments),
                GENAI_IN_PLACE: functools.partial(worker, genai, *arguments, "--shared-cache"),
                GENAI_GROWING: functools.partial(worker, genai, *arguments),
            }
            times = alternate_workers(
                start, launches=given.launches, blocks=BLOCKS, runs=RUNS[phase], settle=SETTLE[phase], busy=given.busy
            )
            record |= {f"{phase}, {name}": time.summary() for name, time in times.items()}
            for one, other in COMPARED:
                ratio = times[one] / times[other]
                rows.append([phase, one, times[one], other, times[other], ratio, f"≤ {BAR}"])
                record[f"{phase}, {one} / {other}"] = ratio.summary()
    print_report(
        f"Dense SmolLM2-135M, fp32, {given.prompt} tokens, {threads} threads",
        ["phase", "ours", "ms", "against", "ms", "ours / that", "bar"],
        rows,
        {
            "dtype": "float32",
            "batch": 1,
            "prompt": given.prompt,
            "launches": given.launches,
            "blocks": BLOCKS,
            "runs": RUNS,
            "warm_up": SETTLE,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai", "torch", "transformers"),
        },
    )


if __name__ == "__main__":
    main()
