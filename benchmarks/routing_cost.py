"""What routing itself costs a layer of a decode step: a router, its decision, a branch and the masks in it.

Layers of hidden size 576 (`--shape`), one token behind 128, random weights, next to no head, fp32. Per layer: with
everything active, the time over the dense graph's; with everything skipped, the time over the same graph without
anything that may be skipped and without routers (benchmarks/common/skipped_graph.py). One thread, and the CPU time of
that thread: other programs take none of it, though they take cache and memory from it, so blocks alternate and the
tenth percentile counts. Where a graph's weights lie in memory moves it by more than routing costs: they lie in huge
pages, all graphs are opened anew several times, each time beginning with the next one, and the median of the
differences counts. "One router" is the graph all of whose Ifs ask the first layer's: what they cost without it.

    python -m benchmarks.routing_cost
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.grid_steps import GridSteps, save_graph, share_threads
from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.lowering_grid import Cell
from benchmarks.common.measure import Samples, alternate, print_report, versions
from benchmarks.common.one_router import ask_first_router
from benchmarks.common.skipped_graph import everything_skipped
from benchmarks.common.threshold_inputs import thresholds_as_inputs
from benchmarks.gpu.random_decoder import SHAPES, RandomDecoder
from dlo_export.exporter.target_graphs import build_model
from dlo_export.runtimes.onnxruntime.providers import CPU

ROUTINGS, LOWERINGS = ("mlp", "layer", "attention"), ("if", "compact")
DENSE, WITHOUT, ONE_ROUTER = "dense", "without", "if, one router"
VARIANTS = (*LOWERINGS, ONE_ROUTER)
BLOCKS, RUNS, SETTLE = 16, 8, 1
ACTIVE, SKIPPED = (Cell("decode", 1, skipped, "layers") for skipped in (0.0, 1.0))


def opened(shape: str, routing: Any, variant: str, cell: Cell, folder: Path) -> GridSteps:
    """A graph, set up for a step.

    Args:
        shape: Of SHAPES.
        routing: What tokens skip.
        variant: A lowering, or DENSE, WITHOUT or ONE_ROUTER.
        cell: The step.
        folder: Takes it.
    """
    lowering = variant if variant in LOWERINGS else "if"
    model = build_model(
        RandomDecoder(shape, routed=variant != DENSE, kind=routing), "none" if variant == DENSE else lowering
    )
    path = folder / f"{routing}-{variant}.onnx"
    if variant == ONE_ROUTER:
        ask_first_router(model)
    if variant in (*LOWERINGS, ONE_ROUTER):
        thresholds_as_inputs(model)
    save_graph(model, path)
    steps = GridSteps(everything_skipped(path, f"{routing}-skipped") if variant == WITHOUT else path, CPU)
    steps.set_up(cell)
    return steps


def measure(shape: str, routing: str, launches: int) -> dict[str, Samples]:
    """Microseconds of a step, of every graph of one kind of routing: of each launch, the tenth percentile of blocks."""
    wanted = {DENSE: (DENSE, ACTIVE), WITHOUT: (WITHOUT, SKIPPED)}
    for variant in VARIANTS:
        wanted |= {f"{variant}, active": (variant, ACTIVE), f"{variant}, skipped": (variant, SKIPPED)}
    found: dict[str, list[float]] = {name: [] for name in wanted}
    for launch in range(launches):
        first = launch % len(wanted)
        names = [*wanted][first:] + [*wanted][:first]
        with tempfile.TemporaryDirectory() as temporary:
            graphs = {name: opened(shape, routing, *wanted[name], Path(temporary)) for name in names}
            candidates = {name: lambda runs, steps=steps: cpu_times(steps, runs) for name, steps in graphs.items()}
            for name, samples in alternate(candidates, blocks=BLOCKS, runs=RUNS, settle=SETTLE).items():
                found[name].append(float(np.percentile(samples.values, 10)))
    return {name: Samples(np.array(values)) for name, values in found.items()}


def cpu_times(steps: GridSteps, runs: int) -> list[float]:
    """Microseconds of this thread in each of so many steps."""
    times = []
    for _ in range(runs):
        start = time.thread_time_ns()
        steps.run()
        times.append((time.thread_time_ns() - start) / 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="h576")
    parser.add_argument("--routings", choices=ROUTINGS, nargs="+", default=ROUTINGS)
    parser.add_argument("--launches", type=int, default=6)
    given = parser.parse_args()
    use_huge_pages()
    share_threads(1)
    layers = RandomDecoder(given.shape, routed=False).config.num_layers
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    for routing in given.routings:
        samples = measure(given.shape, routing, given.launches)
        per_layer = {name: Samples(times.values / layers) for name, times in samples.items()}
        for variant in VARIANTS:
            row: list[Any] = [routing, variant, *(f"{per_layer[name].median:.0f}" for name in (DENSE, WITHOUT))]
            for name, ideal in (("active", DENSE), ("skipped", WITHOUT)):
                more = Samples(per_layer[f"{variant}, {name}"].values - per_layer[ideal].values)
                row.append(more)
                record[f"{routing}, {variant}, {name}"] = more.summary()
            rows.append(row)
    print_report(
        f"What routing costs a layer of a decode step, {given.shape}, one thread, µs of its time",
        ["routing", "lowering", "dense", "nothing but what no token skips", "active: more", "skipped: more"],
        rows,
        {
            "layers": layers,
            "launches": given.launches,
            "blocks": BLOCKS,
            "runs": RUNS,
            "microseconds": record,
            "versions": versions("dlo-export", "onnxruntime", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
