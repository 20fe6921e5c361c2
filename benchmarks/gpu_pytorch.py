"""Captured decode in PyTorch with the dlo kernels, on a GPU: right against the model on the CPU, then how fast.

Of shapes of 1B and 8B, random bfloat16 weights made on the device: a decode step behind 512 tokens and a prefill of
512, dense (the same decoder, every product cuBLAS') and with a share of the MLPs skipped, at batch 1, 4 and 16.

* ``layers``: the share is skipped layer by layer, each for all tokens; thresholds of -1 and 2 decide so.
* ``tokens``: random routers decide per token, for about half of them; at batch 1 that is some layers.

* ``removed``: the dense model without those layers' MLPs and without routers, the least that skipping could take.

One token a step, kernels overlap as those of any decoder do; kernels one by one are timed beside them, and they are
held against those. What skip efficiency is stands in `benchmarks.gpu.skip_efficiency`; `efficiency_line` has T_ideal on
the line between the same decoder's times with everything active and everything skipped.

    python -m benchmarks.gpu_pytorch --out DIR
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu.copy_rate import copy_rate
from benchmarks.gpu.evidence import Evidence, run_part
from benchmarks.gpu.kernel_timing import product_rate
from benchmarks.gpu.pytorch_checks import FORMS, check, check_models, check_ops
from benchmarks.gpu.pytorch_times import Size
from benchmarks.gpu.random_torch_llama import SIZES


def measure(evidence: Evidence, smoke: bool) -> None:
    """Everything that needs a GPU, the most valuable first."""
    torch.backends.cuda.matmul.allow_tf32 = False
    copy = tflops = float("nan")
    with evidence.guard("ceilings"):
        copy, tflops = copy_rate("cuda", 3 if smoke else 10), product_rate(3 if smoke else 10) * 1e-12
        evidence.row("ceilings", copy_gb_s=round(copy * 1e-9), bf16_matmul_tflop_s=round(tflops))
    torch.cuda.empty_cache()
    for name in ("8B", "1B"):
        config = {**SIZES[name], **({"num_hidden_layers": 4, "vocab_size": 32_768} if smoke else {})}
        with evidence.guard(name):
            if evidence.fits(name, 8):
                Size(evidence, name, config, smoke, copy, tflops).measure()
        torch.cuda.empty_cache()
    for dtype in (torch.bfloat16, torch.float32):
        if evidence.fits(f"operators {dtype}", 5):
            check_ops(evidence, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        if evidence.fits(f"captured decoder {dtype}", 10):
            check_models(evidence, dtype, FORMS)


if __name__ == "__main__":
    sys.exit(run_part("pytorch", __doc__, check, measure))
