"""Ways in which a decode step's kernels may overlap, to be tried on a card; whether one of them is right there.

As a program it tries one, at the widths of 8B and 1B: its argument is the candidate's name, rows are lines of JSON on
stdout. A candidate may break its process, or never end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.pytorch_times import CAPACITY, CONTEXT, OVERLAP_BAR, largest_difference, logits_of
from benchmarks.gpu.random_torch_llama import SIZES, random_model
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.step_ops import KernelOps, Overlap, TorchOps
from dlo_export.runtimes.torch.captured.step_weights import StepWeights

_MB: Final = 2**20
_AHEAD = Overlap(attention_ahead=32 * _MB, norm_ahead=4 * _MB, skip_ahead=16 * _MB)
_EARLY = dataclasses.replace(_AHEAD, early=1)
_OWN = dataclasses.replace(_EARLY, norm_ahead=0, product=(32, 256, 4, 3), product_ahead=65_536)

CANDIDATES: Final[Mapping[str, Overlap]] = {
    "apart": Overlap(),
    "attention ahead 32": Overlap(attention_ahead=32 * _MB),
    "ahead": _AHEAD,
    "early": Overlap(early=1),
    "early, ahead": _EARLY,
    "early, ahead, MLP ahead": dataclasses.replace(_EARLY, mlp_ahead=4 * _MB),
    "early, own products": Overlap(early=1, product=(32, 256, 4, 3)),
    "early, own products ahead": Overlap(early=1, product=(32, 256, 4, 3), product_ahead=65_536),
    "early, own products, all ahead": _OWN,
    "early, own products 16 512": dataclasses.replace(_OWN, product=(16, 512, 4, 3)),
    "early, own products 64 128": dataclasses.replace(_OWN, product=(64, 128, 4, 4), product_ahead=131_072),
    "early, own vectors 8 4": Overlap(early=1, vector=(8, 4)),
    "early, own vectors, ahead": dataclasses.replace(_EARLY, vector=(8, 4)),
    "earlier": Overlap(early=2),
    "earlier, ahead": dataclasses.replace(_EARLY, early=2),
    "earlier, own products ahead": dataclasses.replace(_OWN, early=2, attention_ahead=0, skip_ahead=0),
    "earlier, own vectors 4 4": Overlap(early=2, vector=(4, 4)),
    "earlier, own vectors 8 4": Overlap(early=2, vector=(8, 4)),
    "earlier, own vectors 16 8": Overlap(early=2, vector=(16, 8)),
    "earlier, own vectors, MLP ahead": Overlap(early=2, vector=(8, 4), mlp_ahead=4 * _MB),
    "earlier, own vectors, ahead": dataclasses.replace(_EARLY, early=2, vector=(8, 4)),
    "earlier, own vectors, all ahead": dataclasses.replace(_EARLY, early=2, vector=(8, 4), mlp_ahead=4 * _MB),
}


def right_candidates(evidence: Evidence, seconds: float, others: Sequence[Process] = ()) -> dict[str, Overlap]:
    """Tries every candidate in a process of its own, all at once: nothing is timed, and kernels are compiled by then.

    Args:
        evidence: Where rows go.
        seconds: For all of them.
        others: Processes to run beside them.

    Returns:
        Those that say what PyTorch's operators say, at all widths.
    """
    before = len(evidence.rows)
    processes = [Process(f"candidate {name}", "gpu.pytorch_candidates", (name,)) for name in CANDIDATES]
    run_processes(evidence, [*processes, *others], seconds)
    rows = [row for row in evidence.rows[before:] if row["what"] == "candidate"]
    passed = {(row["overlap"], row["model"]) for row in rows if row["passed"]}
    return {name: overlap for name, overlap in CANDIDATES.items() if all((name, model) in passed for model in SIZES)}


def main(candidate: str) -> int:
    """Compares one with PyTorch's operators: three layers, the outer MLPs skipped, three steps behind a prompt."""
    for name, size in SIZES.items():
        # The kernels are compiled as for the whole model; so many processes at once want little memory each.
        config = {**size, "num_hidden_layers": 3, "vocab_size": 8192, "intermediate_size": 2048}
        errors = {}
        for routed in (False, True):
            model = random_model(config, routed=routed, device="cuda", dtype=torch.bfloat16)
            weights = StepWeights(model, kernels=routed)
            for batch in (1, 4) if name == "8B" else (1,):
                ids = torch.randint(0, config["vocab_size"], (batch, CONTEXT), device="cuda")
                got, expected = (
                    logits_of(
                        CapturedDecoder(weights, batch=batch, capacity=CAPACITY, ops=ops),
                        torch.tensor([2.0, -1.0, 2.0], device="cuda"),
                        ids,
                    )
                    for ops in (KernelOps(overlap=CANDIDATES[candidate]), TorchOps())
                )
                errors[f"{'routed' if routed else 'dense'}, batch {batch}"] = largest_difference(got, expected)
        # Which no NaN is, and a maximum of several numbers may hide one.
        passed = all(error <= OVERLAP_BAR for error in errors.values())
        row: dict[str, Any] = {"what": "candidate", "passed": passed, "model": name, "overlap": candidate}
        print(json.dumps({**row, "errors": errors, "bar": OVERLAP_BAR}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
