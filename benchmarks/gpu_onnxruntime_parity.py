"""ONNX Runtime on CUDA: parity of every lowering in every float type, who runs which node, and a dense decode step.

    python -m benchmarks.gpu_onnxruntime_parity --out DIR [--model SmolLM2.gguf] [--ort-plugin-library libdlo_ort.so]
        [--only smollm2]

Models are the two reference checkpoints of tests/data, one of them once more with attention alone routed, and, with
--model, SmolLM2-135M-Instruct's GGUF file dense and under tests/data/smollm2_routers. A process per model and float
type (and one more for the plugin lowering) compares all lowerings with the PyTorch model in float32, that of the
reference checkpoints on the CPU, several at once: nothing is timed meanwhile, and what ends one process costs its own
rows only.
Then the dense model's decode step in bfloat16, IOBinding and a cache that stays on the GPU, is timed against
transformers' static cache, not compiled. --only takes the models whose names begin so.

Without a GPU the same comparison runs once on the CPU provider. Exit codes as benchmarks/gpu/evidence.py has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.command_checks import rows_of_commands
from benchmarks.gpu.dense_decode_times import time_decode
from benchmarks.gpu.evidence import Evidence, run_part
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.lowering_parity import DATA, NATIVE, Job, jobs, rows_of
from dlo_export.checkpoints.errors import InputError
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE
from dlo_export.runtimes.onnxruntime.providers import CPU

PROGRAM = "gpu_onnxruntime_parity"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ort-plugin-library", type=Path, default=os.environ.get(ORT_LIBRARY_VARIABLE) or None)
    parser.add_argument("--job", type=json.loads)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--only", default="")
    own, others = parser.parse_known_args(arguments)
    rows: Iterator[dict[str, Any]] | None = None
    if own.commands:
        rows = rows_of_commands(own.model, "cuda", own.ort_plugin_library)
    elif own.job is not None:
        rows = rows_of(Job(**own.job))
    if rows is not None:
        for row in rows:
            print(json.dumps(row), flush=True)
        return 0
    return run_part(
        "onnxruntime_parity",
        __doc__,
        check,
        functools.partial(measure, model=own.model, library=own.ort_plugin_library, only=own.only),
        others,
    )


def check() -> None:
    """The comparison that a GPU gets, on the CPU provider.

    Raises:
        InputError: It does not hold.
    """
    job = Job("mlp", str(DATA / "reference_mlp_routed"), "fp32", NATIVE, provider="cpu", device="cpu")
    # Outputs stay where the provider computes, as they do on a GPU.
    rows = list(rows_of(job, dataclasses.replace(CPU, reads_back=True)))
    if failed := [row for row in rows if row["passed"] is False]:
        raise InputError(f"on the CPU: {failed}", hint="the graphs are wrong, or this ONNX Runtime is")


def measure(evidence: Evidence, smoke: bool, *, model: Path | None, library: Path | None, only: str) -> None:
    """All rows that need a GPU."""
    library_given = None if library is None else str(Path(library).absolute())
    # What follows needs the rest, where it follows.
    seconds = 45.0 if smoke else evidence.left - (0 if model is None else 30)
    chosen = [job for job in jobs(model, library_given, smoke=smoke) if job.subject.startswith(only)]
    commands = ["--commands", *([] if model is None else ["--model", str(model)])]
    commands += [] if library_given is None else ["--ort-plugin-library", library_given]
    processes = [*map(process_of, chosen), Process("commands", PROGRAM, tuple(commands))]
    run_processes(evidence, processes, seconds=seconds)
    if model is None:
        evidence.row("decode", left_out="no --model is given")
        return
    time_decode(evidence, model, smoke=smoke)


def process_of(job: Job) -> Process:
    """The process that does a job."""
    fields = job.row("parity", "+".join(job.lowerings))
    what = fields.pop("what")
    return Process(what, PROGRAM, ("--job", json.dumps(dataclasses.asdict(job))), fields=fields)


if __name__ == "__main__":
    sys.exit(main())
