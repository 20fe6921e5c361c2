"""Where a dense step's time goes: ONNX Runtime's kernels in our graph and in that of onnxruntime-genai's model builder.

SmolLM2-135M in fp32, batch 1: a prefill of 128 tokens, and one token behind 128; genai's cache is in place, ours grows.
Every kernel's time is ONNX Runtime's own, from its profile, which costs each node a microsecond or two: it shows where
the time goes, and `benchmarks.dense_speed` how much there is. Runs alternate between the two graphs.

    python -m benchmarks.dense_kernels
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.onnxruntime_worker import DecoderStep
from benchmarks.common.routed_artefact import export
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workspace import temporary_folder
from benchmarks.dense_speed import OURS, PROMPT, build_with_genai
from dlo_export.runtimes.artefact.description import MODEL_NAME

GENAI = "genai builder"
ROUNDS = 3
STEPS = {"prefill": 12, "decode": 40}
SETTLE = 5
# What kernels do; names of ONNX, of com.microsoft, and of what ONNX Runtime fuses at load.
WORK = {
    "products": ("MatMul", "Gemm", "FusedMatMul"),
    "attention, rotary, splitting": ("Attention", "GroupQueryAttention", "RotaryEmbedding", "Split"),
    "norms and additions": (
        *("RMSNormalization", "Add", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    ),
    "activation and its product": ("QuickGelu", "Sigmoid", "Mul"),
    "reshaping, which copies the logits": ("Reshape",),
}
OTHER = "all else"


def kernel_times(
    graph: Path, tokens: np.ndarray, sequence: int, threads: int, steps: int, *, shared_cache: bool
) -> dict[str, float]:
    """Microseconds of a step by kind of work, and how many nodes ran (`nodes`): means over the steps."""
    options = ort.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        step = DecoderStep(graph, tokens, sequence, threads, shared_cache=shared_cache, options=options)
        for _ in range(SETTLE + steps):
            step()
        events: list[dict[str, Any]] = json.loads(Path(step.session.end_profiling()).read_text())
    # The prompt that fills the cache, and the first steps, come before the last `steps` runs.
    first = sorted(event["ts"] for event in events if event["name"] == "model_run")[-steps]
    found: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= first:
            operator = event["args"]["op_name"]
            found[next((work for work, operators in WORK.items() if operator in operators), OTHER)] += event["dur"]
            found["nodes"] += 1
    return {work: found[work] / steps for work in (*WORK, OTHER, "nodes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="keep them there, for the next call")
    given = parser.parse_args()
    use_huge_pages()
    threads = given.threads
    tokens = distinct_tokens(PROMPT + 1)
    phases = {"prefill": (tokens[:, :PROMPT], PROMPT), "decode": (tokens, 1)}
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    with temporary_folder() as temporary:
        folder = given.graphs or temporary
        graphs = {name: folder / name / MODEL_NAME for name in (OURS, GENAI)}
        for name, make in ((OURS, export), (GENAI, build_with_genai)):
            if not graphs[name].exists():
                make(smollm2_folder(), folder / name)
        for phase, (step, sequence) in phases.items():
            found: dict[str, list[dict[str, float]]] = {name: [] for name in graphs}
            for _ in range(ROUNDS):
                for name, graph in graphs.items():
                    in_place = name == GENAI
                    times = kernel_times(graph, step, sequence, threads, STEPS[phase], shared_cache=in_place)
                    found[name].append(times)
            for work in (*WORK, OTHER):
                samples = {name: Samples(np.array([run[work] / 1000 for run in runs])) for name, runs in found.items()}
                rows.append([phase, work, *samples.values()])
                record[f"{phase}, {work}"] = {name: sample.summary() for name, sample in samples.items()}
            nodes = {name: runs[0]["nodes"] for name, runs in found.items()}
            rows.append([phase, "nodes that ran", *(f"{count:.0f}" for count in nodes.values())])
            record[f"{phase}, nodes"] = nodes
    print_report(
        f"Kernels of a dense step, SmolLM2-135M, fp32, {threads} threads, ms",
        ["phase", "what", OURS, GENAI],
        rows,
        {
            "dtype": "float32",
            "batch": 1,
            "prompt": PROMPT,
            "rounds": ROUNDS,
            "steps": STEPS,
            "warm_up": SETTLE,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
