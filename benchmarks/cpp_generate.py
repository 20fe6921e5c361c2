"""A decode step of the C++ program against `dlo run`'s and onnxruntime-genai's, on one artefact.

SmolLM2-135M as it is, and with the trained adapter of samples/. Each candidate is a process of its own that is started
anew in every round, takes a prompt of 128 tokens and generates greedily; a round's figure is its median step. Every
second round goes through the candidates backwards. The C++ program and `dlo run` show the routers; genai does not.

    cmake -S samples/cpp_onnxruntime -B build/cpp_onnxruntime -DORT_INCLUDE=… -DORT_LIBRARY=…
    cmake --build build/cpp_onnxruntime
    python -m benchmarks.cpp_generate
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.routed_artefact import export
from benchmarks.common.smollm2 import distinct_tokens, smollm2_gguf
from benchmarks.common.workspace import REPOSITORY, temporary_folder

PROGRAM = REPOSITORY / "build" / "cpp_onnxruntime" / "generate"
ADAPTER = REPOSITORY / "samples" / "smollm2_trained"
CPP, PYTHON, GENAI = "C++ program", "dlo run", "onnxruntime-genai"
PROMPT, STEPS, SETTLE = 128, 64, 15
ROUNDS = 8
BAR = 1.0


def generated_by_python(artefact: Path, tokens: list[int], threads: int) -> dict[str, Any]:
    """Tokens and milliseconds per step of what `dlo run` generates with."""
    from dlo_export.exporter.artefact_runner import open_artefact  # noqa: PLC0415 - of the process that it is measured in
    from dlo_export.runtimes.generation.generate import Generation  # noqa: PLC0415

    with open_artefact(artefact, threads=threads) as runner:
        generation = Generation(runner, [tokens], max_new_tokens=STEPS)
        ends = [time.perf_counter() for _ in generation]
    return {"tokens": generation.sequences[0], "step_ms": [1000 * float(step) for step in np.diff(ends)]}


def generated_by_genai(artefact: Path, tokens: list[int], threads: int) -> dict[str, Any]:
    """The same of onnxruntime-genai."""
    import onnxruntime_genai as og  # noqa: PLC0415 - likewise

    config = og.Config(str(artefact))
    options = json.dumps({"intra_op_num_threads": threads})
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {options}}}}}}}')
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(tokens) + STEPS, min_length=len(tokens) + STEPS)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens)
    ends = []
    for _ in range(STEPS):
        generator.generate_next_token()
        ends.append(time.perf_counter())
    made = [int(token) for token in generator.get_sequence(0)[len(tokens) :]]
    return {"tokens": made, "step_ms": [1000 * float(step) for step in np.diff(ends)]}


WORKERS = {PYTHON: generated_by_python, GENAI: generated_by_genai}


def run_candidate(name: str, program: Path, artefact: Path, tokens: list[int], threads: int) -> dict[str, Any]:
    """One process's answer: `tokens` and `step_ms`."""
    listed, whole = ",".join(map(str, tokens)), str(artefact.absolute())  # it runs in the repository, this may not
    if name == CPP:
        options = ["--steps", str(STEPS), "--threads", str(threads), "--no-end", "--json"]
        command = [str(program.absolute()), whole, "--tokens", listed, *options]
    else:
        command = [sys.executable, "-m", "benchmarks.cpp_generate", "--threads", str(threads)]
        command += ["--worker", name, whole, listed]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    answer: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--program", type=Path, default=PROGRAM, help="samples/cpp_onnxruntime, built")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--artefacts", type=Path, help="keep the exported artefacts here, and take them from here")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "ARTEFACT", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        name, artefact, listed = given.worker
        print(json.dumps(WORKERS[name](Path(artefact), [int(token) for token in listed.split(",")], given.threads)))
        return
    if not given.program.is_file():
        parser.error(f"{given.program} is not there: build samples/cpp_onnxruntime first, or give --program")
    tokens = distinct_tokens(PROMPT)[0].tolist()
    rows, record = [], {}
    with temporary_folder() as temporary:
        folder = given.artefacts or temporary
        for label, adapter in (("dense", None), ("routed", ADAPTER)):
            artefact = folder / label
            if not artefact.exists():
                export(smollm2_gguf(), artefact, adapter)
            times: dict[str, list[float]] = {CPP: [], PYTHON: [], GENAI: []}
            made = {}
            for round_ in range(given.rounds):
                for name in list(times) if round_ % 2 == 0 else reversed(list(times)):
                    made[name] = run_candidate(name, given.program, artefact, tokens, given.threads)
                    times[name].append(float(np.median(made[name]["step_ms"][SETTLE:])))
            samples = {name: Samples(np.array(values)) for name, values in times.items()}
            for name, time_ in samples.items():
                ratio = samples[CPP] / time_
                same = made[name]["tokens"] == made[CPP]["tokens"]
                bar = f"≤ {BAR}" if name == PYTHON else ""
                rows.append([label, name, time_, "" if name == CPP else ratio, bar, "yes" if same else "NO"])
                record[f"{label}, {name}"] = {
                    "milliseconds": time_.summary(),
                    "cpp_ratio": ratio.summary(),
                    "same_tokens": same,
                }
    print_report(
        f"SmolLM2-135M, decode step behind {PROMPT} tokens, fp32, {given.threads} threads",
        ["model", "program", "ms", "C++ / this", "bar", "same tokens"],
        rows,
        {
            "batch": 1,
            "prompt": PROMPT,
            "steps": STEPS,
            "warm_up": SETTLE,
            "rounds": given.rounds,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
