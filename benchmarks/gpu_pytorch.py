"""Captured decode in PyTorch with the dlo kernels, on a GPU: right against the model on the CPU, then how fast.

Of shapes of 1B and 8B, random bfloat16 weights made on the device: a decode step behind 512 tokens and a prefill of
512, dense (the same decoder, every product cuBLAS') and with a share of the MLPs skipped, at batch 1, 4 and 16.

* ``layers``: the share is skipped layer by layer, each for all tokens; thresholds of -1 and 2 decide so.
* ``tokens``: random routers decide per token, for about half of them; at batch 1 that is some layers.

Skip efficiency is (T_dense / T - 1) / (T_dense / T_ideal - 1), T_ideal being T_dense times the share of the step's
bytes (weights, cache) that are still read. `efficiency_line` has T_ideal on the line between the same decoder's times
with everything active and everything skipped.

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
from benchmarks.gpu.transformers_times import outside_reference


def measure(evidence: Evidence, smoke: bool) -> None:
    """Everything that needs a GPU, the most valuable first."""
    torch.backends.cuda.matmul.allow_tf32 = False
    copy = tflops = float("nan")
    with evidence.guard("ceilings"):
        copy, tflops = copy_rate("cuda", 3 if smoke else 10) * 1e-9, product_rate(3 if smoke else 10) * 1e-12
        evidence.row("ceilings", copy_gb_s=round(copy), bf16_matmul_tflop_s=round(tflops))
    for dtype in (torch.bfloat16, torch.float32):
        check_ops(evidence, dtype)
    check_models(evidence, torch.float32, ("kernels",))
    for name in ("8B", "1B"):
        config = {**SIZES[name], **({"num_hidden_layers": 4, "vocab_size": 32_768} if smoke else {})}
        with evidence.guard(name):
            if evidence.fits(name, 12 if smoke else 20):
                Size(evidence, name, config, smoke, copy, tflops).measure()
        torch.cuda.empty_cache()
    if evidence.fits("captured decoder, other forms", 10):
        check_models(evidence, torch.float32, FORMS[1:])
        check_models(evidence, torch.bfloat16, FORMS)
    with evidence.guard("transformers"):
        if evidence.fits("transformers", 5):
            outside_reference(evidence, {**SIZES["1B"], **({"num_hidden_layers": 2} if smoke else {})}, smoke)


if __name__ == "__main__":
    sys.exit(run_part("pytorch", __doc__, check, measure))
