"""Alternating measurement, and the report every benchmark ends with: a table, then one JSON line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlo_export.runtimes.bench import spread

Block = Callable[[int], Sequence[float]]
"""Runs a candidate so many times in a row; returns each run's duration or another cost."""


@dataclass(frozen=True)
class Samples:
    """One number per block: the median of the block's runs.

    Attributes:
        values: [blocks], in the unit the candidate reports.
    """

    values: np.ndarray

    @property
    def median(self) -> float:
        """Median over all blocks."""
        return float(np.median(self.values))

    def summary(self) -> dict[str, float]:
        """Median, p10 and p90, for the JSON line."""
        return {name: round(value, 4) for name, value in spread(self.values).items()}

    def __truediv__(self, other: Samples) -> Samples:
        """Ratio block by block, so that a slow moment of the machine slows down both sides of it."""
        return Samples(self.values / other.values)

    def __str__(self) -> str:
        median, low, high = (_readable(spread(self.values)[name]) for name in ("median", "p10", "p90"))
        return f"{median} ({low} to {high})"


def _readable(value: float) -> str:
    """With three digits, or all of those before the point: thousands are no power of ten."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def joined(parts: Sequence[Mapping[str, Samples]]) -> dict[str, Samples]:
    """The samples of several rounds of measuring the same candidates."""
    return {name: Samples(np.concatenate([part[name].values for part in parts])) for name in parts[0]}


def alternate(candidates: Mapping[str, Block], *, blocks: int, runs: int, settle: int) -> dict[str, Samples]:
    """Measures candidates in alternating blocks.

    Args:
        candidates: What to measure.
        blocks: Blocks of each candidate. Every second round goes through the candidates backwards, so that none always
            follows the same other one.
        runs: Runs in a block that count.
        settle: Runs at the start of each block that do not: a process that has waited finds its threads on one core,
            and the first tens of milliseconds are slow by half.

    Returns:
        Of each candidate, as many samples as there are blocks.
    """
    values: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(blocks):
        for name in candidates if round_ % 2 == 0 else reversed(list(candidates)):
            values[name].append(float(np.median(candidates[name](settle + runs)[settle:])))
    return {name: Samples(np.array(numbers)) for name, numbers in values.items()}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions of distributions, for the JSON line."""
    return {name: importlib.metadata.version(name) for name in distributions}


def print_report(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], result: Mapping[str, Any]) -> None:
    """Prints a Markdown table, then everything as one JSON line.

    Args:
        title: Above the table.
        header: Of the columns.
        rows: Cells of the table.
        result: Content of the JSON line.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    print(f"{title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n")
    print(json.dumps({"benchmark": title, **machine(), **result}), flush=True)
