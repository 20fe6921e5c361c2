"""Every lowering that ONNX Runtime runs here, against the fastest of them, over a grid of steps and skip rates.

Graphs of one model have the same weights, and routers whose thresholds are inputs: who is active is decided from cell
to cell, and routing costs what it costs. Blocks of runs alternate; weights lie in huge pages, and each launch opens
another lowering's graph first (benchmarks/common/huge_pages.py). Before a cell is timed, the lowerings' logits are
compared. What a cell has shown is written to a file at once, and is not measured again by the next call, unless
--disputed asks for cells in which what `auto` would choose was not nearly the fastest. With --write-table, the file's
content becomes the table by which `--lowering auto` chooses.

    python -m benchmarks.lowerings --results grid.jsonl --prepare
    python -m benchmarks.lowerings --results grid.jsonl --seconds 280 --launches 2
    python -m benchmarks.lowerings --results grid.jsonl --seconds 280 --disputed 1.03
    python -m benchmarks.lowerings --results grid.jsonl --write-table 'AMD EPYC (Zen 5), 2 cores'

The graphs take 4 GB of disk, beside the results. With --provider cuda they run on a GPU, in float16, and take 1 GB.
What ends a model's cells early, logits that differ say, costs the others nothing; the command then ends with 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common.arguments import existing_file
from benchmarks.common.grid_steps import GridSteps, share_threads
from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.lowering_grid import Cell, cells
from benchmarks.common.measure import alternate, print_report
from benchmarks.common.threshold_inputs import thresholds_as_inputs
from benchmarks.gpu.random_decoder import SHAPES as DECODERS
from benchmarks.gpu.random_decoder import RandomDecoder
from dlo_export.exporter.target_graphs import build_model
from dlo_export.exporter.weight_file import external_tensors, save_weights
from dlo_export.graph_passes.lowerings.measured import FILE, read_measured
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS, LoweringRecord
from dlo_export.graph_passes.lowerings.registry import find_lowering, lowering_records
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION

SHAPES = ("h576", "h2048")
ROUTINGS = ("mlp", "layer", "attention")
BLOCK_MS = 12.0  # duration of a block of more than one run
BLOCKS = (3, 31)  # least and most blocks of each lowering in a cell
NEAR = {"cpu": 1e-4, "cuda": 2e-2}  # of the largest logit; sums have another order


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        provider: Of ONNX Runtime.
        threads: Of one operator.
        library: libdlo_ort.so; without it, lowerings that need it are left out.
        folder: Of the graphs.
    """

    provider: Any
    threads: int
    library: Path | None
    folder: Path

    def lowerings(self, routing: str) -> list[LoweringRecord]:
        """Those that run here."""
        served = (each for each in lowering_records() if PROVIDER_TARGETS[self.provider] in each.targets)
        return [each for each in served if routing in each.routing and (self.library is not None or not each.domains)]

    def graph(self, shape: str, routing: str, lowering: str) -> Path:
        """Of one lowering; written on first use, with the weights that all of the model's graphs share."""
        path = self.folder / f"{shape}-{routing}-{self.provider}-{lowering}.onnx"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            weights = self.folder / f"{shape}-{routing}-{self.provider}.data"
            dtype = ir.DataType.FLOAT if self.provider == "cpu" else ir.DataType.FLOAT16
            source = RandomDecoder(shape, routed=True, kind=routing)  # type: ignore[arg-type]  # one of ROUTINGS
            model = build_model(source, lowering, dtype, PROVIDER_TARGETS[self.provider])
            thresholds_as_inputs(model)
            save_weights(model, weights, write=not weights.exists())
            layout = {name: (tensor.offset, tensor.length) for name, tensor in external_tensors(model.graph).items()}
            known = weights.with_suffix(".json")
            if not known.exists():
                known.write_text(json.dumps(layout))
            if json.loads(known.read_text()) != json.loads(json.dumps(layout)):
                raise RuntimeError(f"{path}: has other weights than {weights}")
            ir.save(model, path)
        return path

    def steps(self, shape: str, routing: str, record: LoweringRecord) -> GridSteps:
        """An open graph."""
        path = self.graph(shape, routing, record.name)
        return GridSteps(path, BY_OPTION[self.provider], self.library if record.domains else None)


def measure(
    grid: Grid, shape: str, routing: str, wanted: list[Cell], seconds: float, first: int
) -> Iterator[tuple[Cell, dict[str, list[float]]]]:
    """Milliseconds of every lowering's blocks in cells of one model.

    Args:
        grid: What is measured.
        shape: Of the model.
        routing: Its kind.
        wanted: The cells.
        seconds: About so many for each.
        first: Number of the lowering that is opened first.
    """
    records = grid.lowerings(routing)
    turned = records[first % len(records) :] + records[: first % len(records)]
    steps = {each.name: grid.steps(shape, routing, each) for each in turned}
    for cell in wanted:
        logits = {name: each.set_up(cell) for name, each in steps.items()}
        worst = max(np.abs(values - logits["masked"]).max() for values in logits.values())
        if not worst <= NEAR[grid.provider] * np.abs(logits["masked"]).max():
            raise RuntimeError(f"{shape}, {routing}, {cell}: logits differ by {worst:.1e}")
        once = {name: min(each.timed(2)) for name, each in steps.items()}
        runs = {name: max(1, round(BLOCK_MS / each)) for name, each in once.items()}
        # A block's first run finds other weights in the caches: where it is not the only one, it does not count.
        settle = {name: int(count > 1) for name, count in runs.items()}
        block = sum((runs[name] + settle[name]) * each for name, each in once.items()) / 1e3
        blocks = int(np.clip(seconds / block, *BLOCKS))
        candidates = {name: functools.partial(_block, each, runs[name], settle[name]) for name, each in steps.items()}
        samples = alternate(candidates, blocks=blocks, runs=1, settle=0)
        yield cell, {name: [round(float(each), 4) for each in values.values] for name, values in samples.items()}


def _block(steps: GridSteps, runs: int, settle: int, _: int) -> list[float]:
    return [float(np.median(steps.timed(settle + runs)[settle:]))]


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Time of each lowering over the fastest one's, block by block: the medians."""
    fastest = np.array(min(row["ms"].values(), key=np.median))
    return {name: float(np.median(np.array(values) / fastest)) for name, values in row["ms"].items()}


def disputed(rows: Iterable[Mapping[str, Any]], limit: float) -> Iterator[tuple[Any, ...]]:
    """Cells in which what `auto` would choose takes longer than the fastest lowering.

    Args:
        rows: What was measured.
        limit: So much longer, over the fastest one's time.

    Yields:
        Shape, routing, provider and cell.
    """
    for (provider, shape, routing), cells_of in pooled(rows).items():
        found = {cell: ratios({"ms": times}) for cell, times in cells_of.items()}
        target = PROVIDER_TARGETS[provider]  # type: ignore[index]  # of the choices
        names = {name for each in found.values() for name in each}
        skipping = [name for name in names if find_lowering(name, target).make_pass is not None]
        choice = min(skipping, key=lambda name: max(each[name] for each in found.values()))
        yield from ((shape, routing, provider, cell) for cell, each in found.items() if each[choice] > limit)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help=".jsonl that is continued")
    parser.add_argument("--prepare", action="store_true", help="write the graphs and end")
    parser.add_argument(
        "--write-table",
        metavar="MACHINE",
        help="measure nothing; write the package's table, which names the machine so",
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after that")
    parser.add_argument("--cell-seconds", type=float, default=1.0)
    parser.add_argument("--launches", type=int, default=1, help="measure every cell so often, in sessions of their own")
    parser.add_argument("--disputed", type=float, metavar="RATIO", help="measure anew only what auto misses by so much")
    parser.add_argument("--cells", type=int, help="of each model and call at most")
    parser.add_argument("--shapes", nargs="+", choices=sorted(DECODERS), default=SHAPES)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--provider", choices=PROVIDER_TARGETS, default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--ort-plugin-library", type=existing_file, help="libdlo_ort.so: measure the plugin lowering too"
    )
    given = parser.parse_args()
    if given.write_table is None and not given.prepare:
        BY_OPTION[given.provider].check_here()
    use_huge_pages()
    if given.provider == "cuda":
        import torch  # noqa: F401, PLC0415 - ONNX Runtime finds CUDA's libraries among PyTorch's
    end = time.monotonic() + given.seconds
    grid = Grid(given.provider, given.threads, given.ort_plugin_library, given.results.with_suffix(".graphs"))
    share_threads(given.threads)
    if given.write_table is not None:
        given.launches = 0
    faults = []
    for launch, shape, routing in itertools.product(range(given.launches), given.shapes, given.routings):
        for each in grid.lowerings(routing):
            grid.graph(shape, routing, each.name)
        if given.prepare:
            continue
        done = collections.Counter(_key(row) for row in read_rows(given.results))
        layers = RandomDecoder(shape, routed=True).config.num_layers
        wanted = [cell for cell in cells(layers) if done[shape, routing, given.provider, cell] <= launch]
        if given.disputed is not None:
            again = set(disputed(read_rows(given.results), given.disputed))
            wanted = [cell for cell in cells(layers) if (shape, routing, given.provider, cell) in again]
        if not wanted or time.monotonic() > end:
            continue
        first = max(done[shape, routing, given.provider, cell] for cell in wanted)
        facts = {"shape": shape, "routing": routing, "provider": given.provider, "onnxruntime": ort.__version__}
        facts["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        try:
            for cell, times in measure(grid, shape, routing, wanted[: given.cells], given.cell_seconds, first):
                _write_row(given.results, {**facts, **dataclasses.asdict(cell), "ms": times})
                if time.monotonic() > end:
                    break
        except Exception as err:  # ONNX Runtime's own, too: of one model's graphs, which costs the others nothing
            faults.append(f"{shape}, {routing}: {type(err).__name__}: {err}")
            print(faults[-1], file=sys.stderr)
    if not given.prepare:
        _report(read_rows(given.results), given, faults)
    return 1 if faults else 0


def _write_row(results: Path, row: Mapping[str, Any]) -> None:
    """What a cell has shown, at once."""
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = "  ".join(f"{name} {value:.2f}" for name, value in ratios(row).items())
    said = " ".join(str(row[name]) for name in ("shape", "routing", "phase", "size", "pattern", "skipped"))
    print(f"{said}: {shown}", file=sys.stderr)


def pooled(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[Cell, dict[str, list[float]]]]:
    """Blocks of all launches, by provider, shape and routing, then by cell and lowering."""
    found: dict[tuple[str, str, str], dict[Cell, dict[str, list[float]]]] = {}
    for row in rows:
        shape, routing, provider, cell = _key(row)
        times = found.setdefault((provider, shape, routing), {}).setdefault(cell, {})
        for name, values in row["ms"].items():
            times.setdefault(name, []).extend(values)
    return found


def _report(rows: list[dict[str, Any]], given: argparse.Namespace, faults: list[str]) -> None:
    """Per step the worst ratio of each lowering to the fastest one's, over skip rates and patterns."""
    table, records = [], []
    for (provider, shape, routing), cells_of in pooled(rows).items():
        steps: dict[str, dict[str, list[float]]] = {}
        for cell, times in cells_of.items():
            for name, value in ratios({"ms": times}).items():
                steps.setdefault(cell.step, {}).setdefault(name, []).append(value)
        for step, found in steps.items():
            shown = {name: round(max(values), 3) for name, values in found.items()}
            table.append([shape, routing, step, ", ".join(f"{name} {value:.2f}" for name, value in shown.items())])
            records.append({"provider": provider, "shape": shape, "routing": routing, "step": step, "worst": shown})
    if given.write_table is not None:
        _write_table(rows, given)
    print_report(
        f"Lowerings against the fastest of them, {given.threads} threads",
        ["model", "routing", "step", "time over the fastest lowering's, at worst"],
        table,
        {
            "cells": len(rows),
            "rows": records,
            "faults": faults,
            "versions": {"onnxruntime": ort.__version__, "numpy": np.__version__},
        },
    )


def _write_table(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """The package's table: of the models that were measured the new figures, of others those that it has."""
    new = {
        (PROVIDER_TARGETS[row["provider"]], row["routing"], RandomDecoder(row["shape"], routed=True).config.hidden_size)
        for row in rows
    }
    known = [each for each in read_measured() if (each.target, each.routing, each.hidden_size) not in new]
    entries = [dataclasses.asdict(each) for each in known]
    for (provider, shape, routing), cells_of in pooled(rows).items():
        names = list(next(iter(cells_of.values())))
        measured = [row for row in rows if _key(row)[:3] == (shape, routing, provider)]
        entries.append(
            {
                "target": PROVIDER_TARGETS[provider],  # type: ignore[index]  # of the choices
                "machine": given.write_table,
                "onnxruntime": measured[-1]["onnxruntime"],
                "date": measured[-1]["date"],
                "dtype": "fp32" if provider == "cpu" else "fp16",
                "routing": routing,
                "hidden_size": RandomDecoder(shape, routed=True).config.hidden_size,
                "cells": [f"{cell.step}, {cell.pattern}, {cell.skipped}" for cell in cells_of],
                "milliseconds": {
                    name: [float(f"{np.median(times[name]):.4g}") for times in cells_of.values()] for name in names
                },
            }
        )
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    cell = Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})
    return row["shape"], row["routing"], row["provider"], cell


if __name__ == "__main__":
    sys.exit(main())
