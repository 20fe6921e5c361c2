"""The grid of lowerings: what its cells are, and that it measures graphs that compute the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common.lowering_grid import Cell, cells
from benchmarks.lowerings import disputed
from dlo_export.graph_passes.lowerings.measured import read_measured

ROOT = Path(__file__).parents[2]


def test_cells_skip_the_share_that_they_say_when_a_model_has_four_layers() -> None:
    grid = list(cells(4))
    assert len(grid) == len(set(grid)) == 45
    for cell in grid:
        active = cell.active(4)
        assert active.shape == (4, cell.batch, cell.sequence)
        assert active.mean() == 1 - cell.skipped
    # Shares of two layers are halves.
    assert {cell.skipped for cell in cells(2) if cell.pattern == "layers"} == {0.0, 0.5, 1.0}


def test_grid_is_continued_when_it_is_called_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lowerings", "--results", tmp_path / "grid.jsonl", "--shapes", "small"]
    command += ["--routings", "layer", "--cells", "1", "--cell-seconds", "0", "--threads", "1"]
    for measured in (1, 2):
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        report = json.loads(ended.stdout.splitlines()[-1])
        assert report["cells"] == measured
        assert set(report["rows"][0]["worst"]) == {"masked", "compact", "if"}
    first, second = map(json.loads, (tmp_path / "grid.jsonl").read_text().splitlines())
    assert first["skipped"] != second["skipped"]


def test_cells_are_disputed_when_what_auto_would_choose_is_not_nearly_the_fastest() -> None:
    one, four = Cell("decode", 1, 0.5, "layers"), Cell("decode", 4, 0.5, "layers")
    of = {"shape": "h576", "routing": "mlp", "provider": "cpu"}
    times = {one: {"compact": [1.04, 1.04], "if": [1.0, 1.0], "masked": [2.0, 2.0]}}
    times[four] = {"compact": [1.0, 1.0], "if": [1.2, 1.2], "masked": [2.0, 2.0]}
    rows = [{**of, **dataclasses.asdict(cell), "ms": ms} for cell, ms in times.items()]
    # compact is chosen: its worst cell is 1.04, that of `if` 1.2, and masked skips nothing.
    assert list(disputed(rows, 1.03)) == [("h576", "mlp", "cpu", one)]
    assert not list(disputed(rows, 1.05))


def test_table_holds_every_cell_of_the_models_that_were_measured() -> None:
    layers = {576: 8, 2048: 2}
    for model in read_measured():
        named = [f"{cell.step}, {cell.pattern}, {cell.skipped}" for cell in cells(layers[model.hidden_size])]
        assert list(model.cells) == named
        assert {len(times) for times in model.milliseconds.values()} == {len(named)}
    assert Cell("decode", 4, 0.25, "tokens").step == "decode 4"
