"""Four bits, half of the MLPs skipped, against four bits dense: decode of SmolLM2-135M, everybody in one run.

Candidates: llama.cpp on the model's GGUF file as it is published (Q4_1) and requantised to Q4_0, its fastest kernels on
a CPU; onnxruntime-genai on its builder's int4 graph (blocks of 32, accuracy level 4: activations in 8 bits, as
llama.cpp's), and on that graph routed in place, no and half of its layers' MLPs skipped (`if`). The routers are real
ones of zeros, their decisions forced by thresholds: nothing is said about quality here, docs/evaluation.md says what
skipping costs.

One token of batch 1 behind 128 tokens, the same number of threads. genai's step chooses the next token as well,
llama.cpp's ends with the logits. Each candidate has the machine to itself: its process is started, warmed up, measured
and ended before the next one starts, in turn and backwards. Beside waiting processes of the others, llama.cpp takes
three times as long.

    python -m benchmarks.four_bits
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common.measure import print_report, versions
from benchmarks.common.peers import peer_environment, requirements_of
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder, smollm2_gguf
from benchmarks.common.workers import Worker, launch_workers_in_turn
from benchmarks.common.workspace import temporary_folder
from benchmarks.dense_speed import build_with_genai
from benchmarks.genai_routed import HALF, NOTHING, PROMPT, RUNS, SETTLE, routed_graph
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph

LLAMA_CPP = "llama_cpp"
Q4_1, Q4_0, DENSE = "llama.cpp, Q4_1", "llama.cpp, Q4_0", "genai, int4"
OURS = {name: f"genai, int4, routed, {name}" for name in (NOTHING, HALF)}
LAUNCHES = 8
BAR = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--busy", action="store_true", help="take the machine as it is")
    given = parser.parse_args()
    python, gguf = peer_environment(LLAMA_CPP) / "python", smollm2_gguf()
    with temporary_folder() as folder:
        np.save(folder / "tokens.npy", distinct_tokens(PROMPT + 1))
        graph = build_with_genai(smollm2_folder(), folder / "genai", "int4")
        layers = open_foreign_graph(graph).num_layers
        patterns = {NOTHING: [True] * layers, HALF: [i % 2 == 0 for i in range(layers)]}
        graphs = {DENSE: graph}
        for name, active in patterns.items():
            graphs[OURS[name]] = routed_graph(graph, folder / name.replace(" ", "-"), active, "if")
        options: list[str | Path] = [folder / "tokens.npy", "--threads", str(given.threads)]
        llama = functools.partial(Worker, "benchmarks.common.llama_cpp_worker", gguf, *options, python=python)
        start: dict[str, Callable[[], Worker]] = {
            Q4_1: llama,
            Q4_0: functools.partial(llama, "--q4-0", folder / "q4_0.gguf"),
            **{
                name: functools.partial(Worker, "benchmarks.common.genai_worker", path, *options, "--sequence", "1")
                for name, path in graphs.items()
            },
        }
        times = launch_workers_in_turn(
            start, launches=given.launches, runs=RUNS["decode"], settle=SETTLE["decode"], busy=given.busy
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
            "runs": RUNS["decode"],
            "warm_up": SETTLE["decode"],
            "milliseconds": {name: time.summary() for name, time in times.items()},
            "ratio": {name: ratio.summary() for name, ratio in ratios.items()},
            "llama.cpp": requirements_of(LLAMA_CPP).read_text().split(),
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
