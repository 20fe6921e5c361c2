"""What it saves to attend from active tokens' queries only, and to their keys only where skipped ones leave none.

Compact as it is, over compact with attention from all queries, and on a cache that grows also over compact with
attention from active queries to all keys.

Layers of hidden size 576 (`--shape`), random weights, next to no head, fp32; a part of a prompt behind more or less of
it, as `dlo run` feeds long prompts, with all of each layer's tokens active, and with half of them, at random; of the
tokens before as many, or all of them. On a cache that grows, or that is written in place, of slots for the longest
step. One thread, and the CPU time of that thread, blocks alternating: other programs may run beside. Outputs are
compared before anything is timed.

    python -m benchmarks.active_queries
    python -m benchmarks.active_queries --in-place
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.common.grid_steps import GridSteps, save_graph, share_threads
from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.lowering_grid import Cell
from benchmarks.common.measure import Samples, alternate, print_report, versions
from benchmarks.common.threshold_inputs import thresholds_as_inputs
from benchmarks.gpu.random_decoder import SHAPES, RandomDecoder
from benchmarks.routing_cost import cpu_times
from dlo_export.checkpoints.model_types import leaves_keys
from dlo_export.exporter.pipeline import onnxruntime_steps, run_steps
from dlo_export.graph_passes.cache.attend_active_slots import AttendActiveSlotsPass
from dlo_export.graph_passes.cleanup.attend_active_queries import AttendActiveQueriesPass
from dlo_export.graph_passes.cleanup.long_steps import AttendedRows
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.onnxruntime.providers import CPU

ROUTINGS = ("layer", "attention", "attention-active")
ALL, ALL_KEYS, ACTIVE = "all queries", "all keys", "active queries"
SKIPPED = {"none skipped": (0.0, 0.0), "half skipped": (0.5, 0.5), "half, none before": (0.5, 0.0)}
NEAR = 1e-5  # of the largest logit


@dataclasses.dataclass(frozen=True)
class Part(Cell):
    """A part of a prompt.

    Attributes:
        before: Tokens of the prompt in front of it.
        skipped_before: Share of them that was skipped.
    """

    before: int = 0
    skipped_before: float = 0.0

    @property
    def past(self) -> int:
        """Tokens in the cache."""
        return self.before

    def past_active(self) -> np.ndarray:
        """Which of them were active, at random."""
        return np.asarray(np.random.default_rng(1).random(self.before) >= self.skipped_before)


class ActiveQueriesAllKeysPass(AttendActiveQueriesPass):
    """Choose queries only, and have skipped tokens' keys multiplied and hidden."""

    def skipped_keys(self, rows: AttendedRows) -> None:
        """None are left out."""
        del rows


def opened(shape: str, routing: Any, queries: str, folder: Path, slots: int | None) -> GridSteps:
    """The compact graph, as it is exported, or with all queries or all keys; without slots its cache grows."""
    source, record = RandomDecoder(shape, routed=True, kind=routing), find_lowering("compact", "onnxruntime-cpu")
    steps = onnxruntime_steps(source, record, "onnxruntime-cpu", static_cache=slots)
    if queries == ALL:
        choosing = (AttendActiveQueriesPass, AttendActiveSlotsPass)
        steps = [step for step in steps if not isinstance(step.graph_pass, choosing)]
    if queries == ALL_KEYS:
        number = next(n for n, step in enumerate(steps) if isinstance(step.graph_pass, AttendActiveQueriesPass))
        steps[number] = dataclasses.replace(steps[number], graph_pass=ActiveQueriesAllKeysPass())
    model = run_steps(source.plain_model(ir.DataType.FLOAT), steps)
    thresholds_as_inputs(model)
    return GridSteps(save_graph(model, folder / f"{routing}-{queries}.onnx"), CPU)


def measured(graphs: Mapping[str, GridSteps], part: Part, blocks: int) -> dict[str, Samples]:
    """Microseconds of a step in each graph; their logits are compared first."""
    logits = {name: steps.set_up(part) for name, steps in graphs.items()}
    for name in graphs:
        if not np.abs(logits[ALL] - logits[name]).max() <= NEAR * np.abs(logits[ALL]).max():
            raise RuntimeError(f"{part}: logits of {name} differ")
    candidates = {name: lambda runs, steps=steps: cpu_times(steps, runs) for name, steps in graphs.items()}
    return alternate(candidates, blocks=blocks, runs=1, settle=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="h576")
    parser.add_argument("--routings", choices=ROUTINGS, nargs="+", default=ROUTINGS[:2])
    parser.add_argument("--tokens", type=int, nargs="+", default=(128, 256, 512), help="of a step")
    parser.add_argument("--before", type=int, nargs="+", default=(0, 1024, 4096), help="tokens in front of it")
    parser.add_argument("--in-place", action="store_true", help="on a cache that is written in place")
    parser.add_argument("--blocks", type=int, default=5)
    given = parser.parse_args()
    slots = max(given.before) + max(given.tokens) if given.in_place else None
    use_huge_pages()
    share_threads(1)
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    for routing in given.routings:
        # Where skipped tokens leave keys, and on a cache in place, no graph has active queries and all keys.
        forms = (ALL, ALL_KEYS, ACTIVE) if slots is None and not leaves_keys(routing) else (ALL, ACTIVE)
        with tempfile.TemporaryDirectory() as temporary:
            graphs = {name: opened(given.shape, routing, name, Path(temporary), slots) for name in forms}
            for tokens, before in ((tokens, before) for tokens in given.tokens for before in given.before):
                ratios: dict[str, list[Samples]] = {name: [] for name in forms[:-1]}
                for name, (skipped, skipped_before) in SKIPPED.items():
                    part = Part("prefill", tokens, skipped, "tokens", before, skipped_before)
                    samples = measured(graphs, part, given.blocks)
                    for form, found in ratios.items():
                        ratio = samples[ACTIVE] / samples[form]
                        found.append(ratio)
                        record[f"{routing}, {tokens} behind {before}, {name}, over {form}"] = ratio.summary()
                rows += [[routing, tokens, before, form, *each] for form, each in ratios.items()]
    print_report(
        f"Attention from active queries over other attention, {given.shape}, compact, one thread, "
        + ("a cache that grows" if slots is None else f"a cache of {slots} slots written in place"),
        ["routing", "tokens", "behind", "over", *SKIPPED],
        rows,
        {
            "blocks": given.blocks,
            "slots": slots,
            "ratios": record,
            "versions": versions("dlo-export", "onnxruntime", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
