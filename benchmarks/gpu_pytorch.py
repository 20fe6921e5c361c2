"""Captured decode in PyTorch with the dlo kernels, on a GPU: right against the model on the CPU, then how fast.

Of shapes of 1B and 8B, random bfloat16 weights made on the device: a decode step behind 512 tokens and a prefill of
512, dense (the same decoder, every product cuBLAS') and with a share of the MLPs skipped, at batch 1, 4 and 16.

* ``layers``: the share is skipped layer by layer, each for all tokens; thresholds of -1 and 2 decide so.
* ``tokens``: random routers decide per token, for about half of them; at batch 1 that is some layers.

* ``removed``: the dense model without those layers' MLPs and without routers, the least that skipping could take.

One token a step, kernels overlap as those of any decoder do; kernels one by one are timed beside them, and they are
held against those. What skip efficiency is stands in `benchmarks.gpu.skip_efficiency`; `efficiency_line` has T_ideal on
the line between the same decoder's times with everything active and everything skipped.

The model class runs in the same kernels by itself: it is held against its own plain operators, with how often the host
waits in a step, and `generate()` is timed either way.

    python -m benchmarks.gpu_pytorch --out DIR
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.gpu.copy_rate import copy_rate
from benchmarks.gpu.evidence import DONE, Evidence, run_part
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.kernel_timing import product_rate
from benchmarks.gpu.model_kernels import check_model
from benchmarks.gpu.pytorch_checks import FORMS, check, check_models, check_ops
from benchmarks.gpu.pytorch_times import Size
from benchmarks.gpu.random_torch_llama import SIZES

PROGRAM: Final = "gpu_pytorch"
CHECKS: Final[tuple[Callable[[Evidence], None], ...]] = tuple(
    check
    for dtype in (torch.bfloat16, torch.float32)
    for check in (
        functools.partial(check_ops, dtype=dtype),
        functools.partial(check_model, dtype=dtype),
        *(functools.partial(check_models, dtype=dtype, names=(form,)) for form in FORMS),
    )
)
NAMES: Final = ("8B", "1B")
_COMPILERS: Final = 4  # processes for each size
_TIMING_S: Final = 40.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, and those of its processes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--check", type=int)
    parser.add_argument("--compile", type=json.loads)
    own, others = parser.parse_known_args(arguments)
    if own.check is None and own.compile is None:
        return run_part("pytorch", __doc__, check, measure, others)
    with tempfile.TemporaryDirectory() as folder:
        evidence = Evidence("pytorch", Path(folder), 120)
        if own.check is not None:
            CHECKS[own.check](evidence)
            for row in evidence.rows:
                print(json.dumps({name: row[name] for name in row.keys() - {"part", "at_s"}}))
            return DONE
        size = sized(evidence, own.compile["name"], smoke=own.compile["smoke"], layers=2)
        for piece in size.pieces()[own.compile["first"] :: _COMPILERS]:
            size.run(piece)
    return DONE


def measure(evidence: Evidence, smoke: bool) -> None:
    """Everything that needs a GPU: whether it is right, then how fast, the most valuable first."""
    torch.backends.cuda.matmul.allow_tf32 = False
    # Triton compiles for minutes, on one core. So everything that is timed runs before, on two layers, side by side
    # with the checks; what was compiled lies in Triton's cache on disk.
    checks = [Process(f"check {number}", PROGRAM, ("--check", str(number))) for number in range(len(CHECKS))]
    compiled = [
        Process(
            f"{name}, compiling {first}",
            PROGRAM,
            ("--compile", json.dumps({"name": name, "first": first, "smoke": smoke})),
            needed=False,
        )
        for name in NAMES
        for first in range(_COMPILERS)
    ]
    run_processes(evidence, [*compiled, *checks], evidence.left - _TIMING_S)
    copy = tflops = float("nan")
    with evidence.guard("ceilings"):
        copy, tflops = copy_rate("cuda", 3 if smoke else 10), product_rate(3 if smoke else 10) * 1e-12
        evidence.row("ceilings", copy_gb_s=round(copy * 1e-9), bf16_matmul_tflop_s=round(tflops))
    torch.cuda.empty_cache()
    for name in NAMES:
        with evidence.guard(name):
            if evidence.fits(name, 8):
                size = sized(evidence, name, smoke=smoke, layers=4 if smoke else None, copy=copy, tflops=tflops)
                for piece in size.pieces():
                    size.run(piece)
                del size
        torch.cuda.empty_cache()


def sized(
    evidence: Evidence, name: str, *, smoke: bool, layers: int | None, copy: float = 1e12, tflops: float = 1.0
) -> Size:
    """A size to time.

    Args:
        evidence: Where rows go.
        name: Of `SIZES`.
        smoke: Little of everything.
        layers: Of a model that need not be whole, and has a small vocabulary; None for the whole one.
        copy: The card's copy bandwidth, bytes per second.
        tflops: Its rate of bfloat16 products, TFLOP/s.
    """
    smaller = {} if layers is None else {"num_hidden_layers": layers, "vocab_size": 32_768}
    return Size(evidence, name, {**SIZES[name], **smaller}, smoke, copy, tflops)


if __name__ == "__main__":
    sys.exit(main())
