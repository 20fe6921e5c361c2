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
from benchmarks.gpu.pytorch_times import CAPACITY, OVERLAP_BAR, largest_difference, logits_of
from benchmarks.gpu.random_torch_llama import SIZES, random_model
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.step_ops import KernelOps, Overlap, TorchOps
from dlo_export.runtimes.torch.captured.step_weights import StepWeights

_MB: Final = 2**20
_AHEAD = Overlap(attention_ahead=32 * _MB, norm_ahead=4 * _MB, skip_ahead=16 * _MB)
_ALL_AHEAD = dataclasses.replace(_AHEAD, mlp_ahead=4 * _MB)
_OWN = dataclasses.replace(_ALL_AHEAD, norm_ahead=0, product=(32, 256, 4, 3), product_ahead=65_536)

CANDIDATES: Final[Mapping[str, Overlap]] = {
    "apart": Overlap(),
    "ahead": _AHEAD,
    "earlier": Overlap(early=2),
    "earlier, ahead": dataclasses.replace(_ALL_AHEAD, early=2),
    "earlier, own vectors": Overlap(early=2, vector=(8, 4)),
    "earlier, own vectors, ahead": dataclasses.replace(_ALL_AHEAD, early=2, vector=(8, 4)),
    "early, own vectors": Overlap(early=1, vector=(8, 4)),
    "earlier, own products, ahead": dataclasses.replace(_OWN, early=2),
}
_BATCHES: Final = (1, 16)
_PROMPT: Final = 48  # short, so that prompts' kernels are those of few tokens: fewer to compile


def right_candidates(
    evidence: Evidence, seconds: float, others: Sequence[Process] = ()
) -> dict[str, dict[int, dict[str, Overlap]]]:
    """Tries every candidate in a process of its own, all at once: nothing is timed, and kernels are compiled by then.

    Args:
        evidence: Where rows go.
        seconds: For all of them; what has not been tried by then is left out.
        others: Processes to run beside them.

    Returns:
        By shape and batch, those that say what PyTorch's operators say; kernels one by one are among them in any case.
    """
    before = len(evidence.rows)
    processes = [Process(f"candidate {name}", "gpu.pytorch_candidates", (name,)) for name in CANDIDATES]
    run_processes(evidence, [*processes, *others], seconds)
    rows = [row for row in evidence.rows[before:] if row["what"] == "candidate"]
    passed = {(row["overlap"], row["model"], row["batch"]) for row in rows if row["passed"]}
    return {
        model: {
            batch: {
                name: overlap
                for name, overlap in CANDIDATES.items()
                if overlap == Overlap() or (name, model, batch) in passed
            }
            for batch in _BATCHES
        }
        for model in SIZES
    }


def main(candidate: str) -> int:
    """Compares one with PyTorch's operators: three layers, the outer MLPs skipped, three steps behind a prompt."""
    overlap = CANDIDATES[candidate]
    for batch in (1,) if overlap.vector else _BATCHES:
        for name, size in sorted(SIZES.items(), reverse=True):  # the larger one first
            # The kernels are compiled as for the whole model; so many processes at once want little memory each.
            config = {**size, "num_hidden_layers": 3, "vocab_size": 8192, "intermediate_size": 2048}
            ids = torch.randint(0, config["vocab_size"], (batch, _PROMPT // batch), device="cuda")
            errors = {}
            for routed in (True, False):
                model = random_model(config, routed=routed, device="cuda", dtype=torch.bfloat16)
                weights = StepWeights(model, kernels=routed)
                got, expected = (
                    logits_of(
                        CapturedDecoder(weights, batch=batch, capacity=CAPACITY, ops=ops),
                        torch.tensor([2.0, -1.0, 2.0], device="cuda"),
                        ids,
                    )
                    for ops in (KernelOps(overlap=overlap), TorchOps())
                )
                errors["routed" if routed else "dense"] = largest_difference(got, expected)
            row: dict[str, Any] = {"what": "candidate", "model": name, "batch": batch, "overlap": candidate}
            # Which no NaN is, and a maximum of several numbers may hide one.
            passed = all(error <= OVERLAP_BAR for error in errors.values())
            print(json.dumps({**row, "passed": passed, "errors": errors, "bar": OVERLAP_BAR}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
