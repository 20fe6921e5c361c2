"""What the experiments leave for a reader: tables, and plots where matplotlib is installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.papers.forms import Form
from benchmarks.papers.plots import save_plots
from benchmarks.papers.results import Results
from benchmarks.papers.tables import COSTS, all_tables

_TABLES = "papers.md"


def heading(results: Results, form: tuple[str, Form], *, model: str | None, device: str, budget_s: float) -> str:
    """What the tables were run with.

    Args:
        results: Hold what training cost.
        form: Its name and sizes.
        model: Name of what everything started from; None for the toy.
        device: "cpu" or "cuda".
        budget_s: Seconds there were.
    """
    name, sizes = form
    toy = "a tiny model made and taught on the spot: it shows that the command works, and nothing about the methods"
    lines = [
        f"`{name}` form on {device}, {budget_s:.0f} s; model: {model or toy}.",
        f"Held out: {sizes.held_out_tokens:,} tokens of each domain, windows of {sizes.sequence}, fp32. Training: "
        f"{sizes.dtype}, sequences of {sizes.sequence}.",
    ]
    if COSTS in results:
        costs = results[COSTS]
        speeds = ", ".join(f"{speed:,.0f} {kind}" for kind, speed in costs["tokens_per_second"].items())
        how = "Planned with" if "given" in costs else "Measured first"
        lines.append(f"{how}: {costs['batch']} sequences a step; tokens/s of the deepened model: {speeds}.")
    return "# The papers' experiments\n\n" + "\n".join(lines)


def write_tables(results: Results, about: str) -> str:
    """Writes all tables beside the results, which takes no time: nothing is read but these.

    Args:
        results: To read.
        about: What they were run with.

    Returns:
        The tables.
    """
    tables = all_tables(results, about)
    (results.folder / _TABLES).write_text(tables, encoding="utf-8")
    return tables


def write_plots(results: Results, publish: Path | None = None) -> None:
    """Draws plots beside the results.

    Args:
        results: To read.
        publish: Folder for copies of them and of the tables.
    """
    plots = save_plots(results)
    if plots is None:
        print("plots: left out, matplotlib is not installed (benchmarks/requirements-papers.txt)", file=sys.stderr)
    if publish is not None:
        publish.mkdir(parents=True, exist_ok=True)
        for file in (results.folder / _TABLES, *(plots or ())):
            shutil.copy(file, publish)
