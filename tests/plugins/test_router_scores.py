"""The Triton kernel of the router's operator: interpreted against NumPy, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

from dlo_export.graph_passes.spec.ops import ROUTER
from dlo_export.plugins.compile import compile_all
from dlo_export.plugins.variants import TARGETS, variants

# TRITON_INTERPRET must be set before triton is imported: a program of its own.
INTERPRETED = """
import numpy as np
import torch
from dlo_export.plugins.kernels import launch
from dlo_export.plugins.router_scores.reference import router_scores

generator = torch.Generator().manual_seed(0)
for dtype in ("float32", "float16", "bfloat16"):
    for batch, sequence, hidden in ((1, 1, 72), (2, 5, 1032), (1, 3, 4096)):
        x = torch.randn(batch, sequence, hidden, generator=generator).to(getattr(torch, dtype))
        weight = 2 * torch.randn(hidden, 1, generator=generator) / hidden**0.5
        scores = torch.full((batch, sequence), torch.nan)
        launch("RouterScores", x, weight, scores, dtype=dtype)
        np.testing.assert_allclose(scores.numpy(), router_scores(x.float().numpy(), weight.numpy()), rtol=0, atol=1e-6)
"""


def test_kernel_gives_the_references_scores_when_interpreted() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_every_variant_compiles_without_spills_when_no_gpu_is_there() -> None:
    wanted = variants(TARGETS, ops=[ROUTER.name])
    kernels = compile_all(wanted)
    assert [kernel.variant for kernel in kernels] == wanted
    assert not [kernel.variant.name for kernel in kernels if kernel.spill_bytes or kernel.stack_bytes]
    assert all(kernel.shared_bytes <= 1024 for kernel in kernels)
