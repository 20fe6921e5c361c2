"""Latency against skip rate: the same engines, decisions forced at random with the wanted share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.engines.gpu_subject import Subject
from dlo_export.runtimes import bench
from dlo_export.runtimes.runner import Runner

SKIP_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Latency:
    """One row of the table.

    Attributes:
        subject: Name of the artefact.
        lowering: Of its routed layers.
        skip_rate: Share of (token, routed layer) pairs that skip; None where nothing is routed.
        timing: Seconds, wall time of a step with all of its copies.
        cuda_graph: What the runner says of its captured graph.
    """

    subject: str
    lowering: str
    skip_rate: float | None
    timing: bench.Timing
    cuda_graph: str

    def to_json(self) -> dict[str, Any]:
        """For the JSON line."""
        values = {"artefact": self.subject, "lowering": self.lowering, "skip_rate": self.skip_rate}
        return values | {"cuda_graph": self.cuda_graph} | self.timing.summary()


def measure_latency(
    subject: Subject, workload: bench.Workload, skip_rates: Sequence[float] = SKIP_RATES
) -> list[Latency]:
    """Times an artefact's engines, all skip rates in alternating blocks.

    Args:
        subject: Routed: its forced engines are timed, one row per rate. Dense: its released ones, one row.
        workload: What to feed.
        skip_rates: Shares of pairs that skip.
    """
    tokens = np.random.default_rng(workload.seed).integers(
        0, subject.vocab_size, workload.batch * (workload.prompt_tokens + workload.decode_tokens)
    )
    rates: list[float | None] = [None] if subject.open_forced is None else list(skip_rates)
    with (subject.open_forced or subject.open_free)() as runner:
        timings = bench.compare_speed(
            [bench.Subject(runner, tokens.tolist(), None if rate is None else 1 - rate) for rate in rates], workload
        )
        cuda_graph = graph_status(runner)
    return [
        Latency(subject.name, subject.lowering, rate, timing, cuda_graph)
        for rate, timing in zip(rates, timings, strict=True)
    ]


def graph_status(runner: Runner) -> str:
    """What a runner says of its captured graph; "none" of one that knows none."""
    return str(getattr(runner, "cuda_graph", "none"))


def latency_table(rows: Sequence[Latency]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; speed-ups are over the dense engine, or over an artefact's own 0 % where none was given."""
    dense = next((row for row in rows if row.skip_rate is None), None)
    own = {row.subject: row for row in rows if row.skip_rate == 0}
    base = "dense" if dense else "0 % skipped"
    header = ["artefact", "lowering", "CUDA graph", "skipped", "prefill, ms", "decode, ms"]
    header += [f"prefill, times {base}", f"decode, times {base}"]
    cells = []
    for row in rows:
        against = (dense or own.get(row.subject) or row).timing
        cells.append(
            [
                row.subject,
                row.lowering,
                "yes" if row.cuda_graph == "captured" else "no",
                "" if row.skip_rate is None else f"{row.skip_rate:.0%}",
                _milliseconds(bench.spread(row.timing.prefill)),
                _milliseconds(bench.spread(row.timing.decode)),
                f"{np.median(against.prefill) / np.median(row.timing.prefill):.2f}",
                f"{np.median(against.decode) / np.median(row.timing.decode):.2f}",
            ]
        )
    return header, cells


def _milliseconds(spread: Mapping[str, float]) -> str:
    return "{:.3g} ({:.3g} to {:.3g})".format(*(spread[key] * 1e3 for key in ("median", "p10", "p90")))
