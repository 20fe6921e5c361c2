"""Four bits, half of the MLPs skipped, against four bits dense: decode of SmolLM2-135M, everybody in one run.

Candidates: llama.cpp on the model's GGUF file as it is published (Q4_1) and requantised to Q4_0, its fastest kernels on
a CPU; onnxruntime-genai's builder's int4 graph (blocks of 32, accuracy level 4: activations in 8 bits, as llama.cpp's);
and that graph routed in place, no and half of its layers' MLPs skipped (`if`). The routers are real ones of zeros,
their decisions forced by thresholds: nothing is said about quality here, docs/evaluation.md says what skipping costs.

One token of batch 1 behind 128 tokens, the same number of threads, a process of its own each, alternating blocks.

    python -m benchmarks.four_bits
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.dense_speed import build_with_genai
from benchmarks.genai_routed import HALF, NOTHING, PROMPT, routed_graph
from benchmarks.measure import print_report, versions
from benchmarks.peers import peer_environment, requirements_of
from benchmarks.smollm2 import distinct_tokens, smollm2_folder, smollm2_gguf
from benchmarks.workers import Worker, alternate_workers
from benchmarks.workspace import WORKSPACE
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph

LLAMA_CPP = "llama_cpp"
Q4_1, Q4_0, DENSE = "llama.cpp, Q4_1", "llama.cpp, Q4_0", "genai, int4"
OURS = {name: f"genai, int4, routed, {name}" for name in (NOTHING, HALF)}
LAUNCHES, BLOCKS, RUNS, SETTLE = 6, 4, 20, 15
BAR = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--busy", action="store_true", help="take the machine as it is")
    given = parser.parse_args()
    python, gguf = peer_environment(LLAMA_CPP) / "python", smollm2_gguf()
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        folder = Path(temporary)
        np.save(folder / "tokens.npy", distinct_tokens(PROMPT + 1))
        graph = build_with_genai(smollm2_folder(), folder / "genai", "int4")
        layers = open_foreign_graph(graph).num_layers
        patterns = {NOTHING: [True] * layers, HALF: [i % 2 == 0 for i in range(layers)]}
        graphs = {DENSE: graph}
        for name, active in patterns.items():
            graphs[OURS[name]] = routed_graph(graph, folder / name.replace(" ", "-"), active, "if")
        tokens, threads = folder / "tokens.npy", ["--threads", str(given.threads)]
        llama = functools.partial(Worker, "benchmarks.llama_cpp_worker", gguf, tokens, *threads, python=python)
        onnx = ["--sequence", "1", *threads, "--shared-cache"]
        start: dict[str, Callable[[], Worker]] = {
            Q4_1: llama,
            Q4_0: functools.partial(
                Worker,
                "benchmarks.llama_cpp_worker",
                gguf,
                tokens,
                *threads,
                "--q4-0",
                folder / "q4_0.gguf",
                python=python,
            ),
            **{
                name: functools.partial(Worker, "benchmarks.onnxruntime_worker", path, tokens, *onnx)
                for name, path in graphs.items()
            },
        }
        times = alternate_workers(
            start, launches=given.launches, blocks=BLOCKS, runs=RUNS, settle=SETTLE, busy=given.busy
        )
    ours = times[OURS[HALF]]
    ratios = {name: ours / time for name, time in times.items() if name != OURS[HALF]}
    bars = dict.fromkeys((Q4_1, Q4_0, DENSE), f"< {BAR}")
    rows = [[name, time, ratios.get(name, ""), bars.get(name, "")] for name, time in times.items()]
    print_report(
        f"SmolLM2-135M, 4 bits, decode behind {PROMPT} tokens, {given.threads} threads",
        ["candidate", "ms", "half skipped / this", "bar"],
        rows,
        {
            "batch": 1,
            "prompt": PROMPT,
            "accuracy_level": 4,
            "launches": given.launches,
            "blocks": BLOCKS,
            "runs": RUNS,
            "warm_up": SETTLE,
            "milliseconds": {name: time.summary() for name, time in times.items()},
            "ratio": {name: ratio.summary() for name, ratio in ratios.items()},
            "llama.cpp": requirements_of(LLAMA_CPP).read_text().split(),
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
