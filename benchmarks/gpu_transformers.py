"""Dense decode steps of transformers on a GPU, compiled and eager: what captured decode is held against.

Shapes of 1B and 8B with random bfloat16 weights, behind 512 tokens in a static cache, batch 1. They run in a process
of its own, which the budget's end may end: what it has measured by then stands.

    python -m benchmarks.gpu_transformers --out DIR
"""

from __future__ import annotations

import sys

from benchmarks.gpu.evidence import Evidence, run_part
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.random_torch_llama import TINY
from benchmarks.gpu.transformers_times import step_times


def check() -> None:
    """A small step on the CPU, as it comes."""
    step_times(TINY, "eager", steps=4, device="cpu")


def measure(evidence: Evidence, smoke: bool) -> None:
    """All of them, the compiled 8B first."""
    options = ("--smoke",) if smoke else ()
    run_processes(evidence, [Process("transformers", "gpu.transformers_times", options)], evidence.left, threads=8)


if __name__ == "__main__":
    sys.exit(run_part("transformers", __doc__, check, measure))
