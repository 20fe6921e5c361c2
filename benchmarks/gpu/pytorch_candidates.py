"""How a decode step's kernels overlap best on a card: every candidate in turn, each held against kernels one by one.

A program of its own, since a candidate may break, or never end: arguments are the shape, and the candidates to try;
rows are lines of JSON on stdout.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.pytorch_times import (
    CAPACITY,
    CONTEXT,
    OVERLAP_BAR,
    Subject,
    largest_difference,
    logits_of,
    spread_layers,
)
from benchmarks.gpu.random_torch_llama import SIZES, random_model
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.step_ops import KernelOps, Overlap
from dlo_export.runtimes.torch.captured.step_weights import StepWeights

_MB: Final = 2**20
_AHEAD = Overlap(attention_ahead=32 * _MB, norm_ahead=4 * _MB, skip_ahead=16 * _MB)
_EARLY = dataclasses.replace(_AHEAD, early=True)
_OWN = dataclasses.replace(_EARLY, norm_ahead=0, product=(32, 256, 4, 3), product_ahead=65_536)

CANDIDATES: Final[Mapping[str, Overlap]] = {
    "apart": Overlap(),
    "attention ahead 16": Overlap(attention_ahead=16 * _MB),
    "attention ahead 32": Overlap(attention_ahead=32 * _MB),
    "ahead": _AHEAD,
    "ahead more": dataclasses.replace(_AHEAD, norm_ahead=12 * _MB, skip_ahead=32 * _MB),
    "early": Overlap(early=True),
    "early, ahead": _EARLY,
    "early, ahead more": dataclasses.replace(_EARLY, norm_ahead=12 * _MB, skip_ahead=32 * _MB),
    "early, ahead, MLP ahead": dataclasses.replace(_EARLY, mlp_ahead=128),
    "early, own products": dataclasses.replace(_OWN, attention_ahead=0, skip_ahead=0, product_ahead=0),
    "early, own products ahead": dataclasses.replace(_OWN, attention_ahead=0, skip_ahead=0),
    "early, own products, all ahead": _OWN,
    "early, own products, all ahead, MLP ahead": dataclasses.replace(_OWN, mlp_ahead=128),
    "early, own products 16 512": dataclasses.replace(_OWN, product=(16, 512, 4, 3)),
    "early, own products 64 128": dataclasses.replace(_OWN, product=(64, 128, 4, 4), product_ahead=131_072),
    "early, own products 32 128": dataclasses.replace(_OWN, product=(32, 128, 4, 6)),
    "early, own products, more ahead": dataclasses.replace(_OWN, product_ahead=131_072, skip_ahead=32 * _MB),
}


def fastest_overlaps(
    evidence: Evidence, name: str, seconds: float, smoke: bool, tried: Sequence[str] = tuple(CANDIDATES)
) -> tuple[Overlap, Overlap]:
    """Tries them; one that ends its process costs itself alone.

    Args:
        evidence: Where rows go.
        name: The shape.
        seconds: For all of them.
        smoke: Few layers.
        tried: Names of candidates.

    Returns:
        The fastest right one of the dense decoder, and of the routed one with half of its MLPs skipped.
    """
    waiting, end = list(tried), evidence.left - seconds
    while waiting and evidence.left > end:
        before = len(evidence.rows)
        process = Process("candidates", "gpu.pytorch_candidates", (name, str(int(smoke)), *waiting))
        run_processes(evidence, [process], evidence.left - end, threads=4)
        done = {row["overlap"] for row in evidence.rows[before:] if row["what"] == "candidate"}
        waiting = [candidate for candidate in waiting if candidate not in done][1:]
    rows = [row for row in evidence.rows if row["what"] == "candidate" and row["model"] == name and "dense_ms" in row]
    right = [row for row in rows if row["passed"] is not False]
    if not right:
        return Overlap(), Overlap()
    dense, routed = (min(right, key=lambda row: row[key])["overlap"] for key in ("dense_ms", "half_ms"))
    evidence.row("overlap taken", model=name, dense=dense, routed=routed)
    return CANDIDATES[dense], CANDIDATES[routed]


def main(arguments: Sequence[str]) -> int:
    """Tries candidates in turn."""
    name, smoke, *candidates = arguments
    config = {**SIZES[name], **({"num_hidden_layers": 4, "vocab_size": 32_768} if int(smoke) else {})}
    layers = config["num_hidden_layers"]
    dense = StepWeights(random_model(config, routed=False, device="cuda", dtype=torch.bfloat16), kernels=False)
    routed = StepWeights(random_model(config, routed=True, device="cuda", dtype=torch.bfloat16), kernels=True)
    ids = torch.randint(0, config["vocab_size"], (1, CONTEXT), device="cuda")

    def skipping(share: float) -> torch.Tensor:
        chosen = np.where(spread_layers(layers, share), 2.0, -1.0)
        return torch.tensor(chosen, dtype=torch.float32, device="cuda")

    def opened(weights: StepWeights, overlap: Overlap) -> CapturedDecoder:
        return CapturedDecoder(weights, batch=1, capacity=CAPACITY, ops=KernelOps(overlap=overlap))

    half = skipping(0.5)
    expected = [logits_of(opened(weights, Overlap()), half, ids) for weights in (dense, routed)]
    for candidate in candidates:
        values: dict[str, Any] = {"what": "candidate", "model": name, "overlap": candidate}
        try:
            decoders = [opened(weights, CANDIDATES[candidate]) for weights in (dense, routed)]
            errors = [
                largest_difference(logits_of(decoder, half, ids), wanted)
                for decoder, wanted in zip(decoders, expected, strict=True)
            ]
            right = max(errors) <= OVERLAP_BAR  # which no NaN is
            subjects = {
                "dense_ms": Subject("dense", decoders[0]),
                **{
                    f"{word}_ms": Subject(word, decoders[1], skipping(share))
                    for word, share in (("active", 0.0), ("half", 0.5), ("skipped", 1.0))
                },
            }
            times = {
                word: [subject.block_ms(ids[:, 0], [CONTEXT], 8) for _ in range(2 if int(smoke) else 7)][1:]
                for word, subject in subjects.items()
            }
            values |= {word: round(float(np.median(found)), 4) for word, found in times.items()}
            values |= {"passed": None if right else False, "errors": errors, "bar": OVERLAP_BAR}
        except RuntimeError as err:  # Triton's and CUDA's alike: what breaks on a card is a finding
            values |= {"passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
        print(json.dumps(values), flush=True)
        torch.cuda.synchronize()  # raises where the context is beyond use, which ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
