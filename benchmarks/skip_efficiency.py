"""How much of the work that routing skips is time saved.

Efficiency = (T_dense / T − 1) / (T_dense / T_ideal − 1). T_ideal lies on the line between the dense artefact and the
routed one that skips every MLP, at the measured active rate. Decode is one token of batch 1 behind 128 tokens; prefill
is 128 tokens. Routers are part of the graph and decide by themselves; their weights were fitted so that they decide as
a pattern wants (benchmarks/routing.py):

* decode: that share of the layers runs its MLP;
* prefill, tokens: in every layer, that share of the tokens, chosen at random;
* prefill, layers: that share of the layers, for all tokens.

What the second pattern loses is mostly not overhead: a MatMul on half of the rows takes more than half of the time,
because all of its weights come from memory all the same. The table says which part of the loss that is: MatMul kernels'
own time, from ONNX Runtime's profile.

Dense, all-skipped and routed artefact run in processes of their own, alternating, started anew several times; see
benchmarks/workers.py.

    python -m benchmarks.skip_efficiency smollm2
    python -m benchmarks.skip_efficiency h2048

`h2048` is a random model of hidden size 2048, intermediate size 8192 and 8 layers; it takes 6 GB of disk and 9 of
memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_profile import mlp_matmul_seconds
from benchmarks.measure import Samples, print_report, versions
from benchmarks.random_llama import H2048, random_llama_folder
from benchmarks.routed_artefact import active_rate, export, with_routers_of
from benchmarks.routing import fit_routers, layers_active, routable_model, save_routers, tokens_active
from benchmarks.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.workers import Worker, alternate_workers
from benchmarks.workspace import WORKSPACE
from exporter.checkpoint import open_checkpoint

PROMPT = 128
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
BARS = {"smollm2": 0.75, "h2048": 0.85}
TITLES = {"smollm2": "SmolLM2-135M", "h2048": "H=2048, I=8192, 8 layers, random weights"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        phase: "decode" or "prefill".
        pattern: "layers" or "tokens".
        graph: Routed accordingly.
        tokens: .npy of the step and of what is before it.
        sequence: Tokens of the step.
        rate: Measured share of active MLPs.
    """

    phase: str
    pattern: str
    graph: Path
    tokens: Path
    sequence: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure: launches of the processes, blocks per launch, runs per block of decode and of prefill."""

    launches: int
    blocks: int
    decode_runs: int
    prefill_runs: int


EFFORTS = {"smollm2": Effort(5, 5, 20, 5), "h2048": Effort(3, 5, 8, 2)}


def make_cases(model_folder: Path, folder: Path) -> tuple[Path, list[Case]]:
    """Exports the dense artefact and the routed one, and writes a variant per case; returns the dense graph first."""
    with open_checkpoint(str(model_folder)) as checkpoint:
        model = routable_model(checkpoint.config.raw, checkpoint.tensors)
        layers, vocabulary = checkpoint.config.num_layers, checkpoint.config.vocab_size
    tokens = distinct_tokens(PROMPT + 1, vocabulary)
    files = {"decode": folder / "decode.npy", "prefill": folder / "prefill.npy"}
    np.save(files["decode"], tokens)
    np.save(files["prefill"], tokens[:, :PROMPT])
    dense = export(model_folder, folder / "dense")
    routed = export(model_folder, folder / "routed", save_routers(model, folder / "adapter"))
    cases = []
    for pattern, wanted_of in (("layers", layers_active), ("tokens", tokens_active)):
        for rate in RATES:
            wanted = wanted_of(rate, layers, PROMPT + 1)
            fit_routers(model, tokens, wanted)
            graph = with_routers_of(model, routed, f"{pattern}-{rate:.2f}")
            phases = [("prefill", PROMPT), ("decode", 1)] if pattern == "layers" else [("prefill", PROMPT)]
            for phase, sequence in phases:
                decided = active_rate(graph, np.load(files[phase]), sequence)
                cases.append(Case(phase, pattern, graph, files[phase], sequence, decided))
    return dense, cases


def rows_of(cases: list[Case], dense: Path, effort: Effort, threads: int) -> Iterator[dict[str, Any]]:
    """Measures the cases, each against the dense artefact and the all-skipped one of its phase."""
    nothing = {case.phase: case for case in cases if case.rate == 0}
    for case in cases:
        graphs = {"dense": dense, "none": nothing[case.phase].graph, "routed": case.graph}
        if case.rate == 0:
            del graphs["routed"]
        start: dict[str, Callable[[], Worker]] = {
            name: functools.partial(_worker, graph, case, threads) for name, graph in graphs.items()
        }
        runs = effort.decode_runs if case.phase == "decode" else effort.prefill_runs
        times = alternate_workers(start, launches=effort.launches, blocks=effort.blocks, runs=runs, warm_up=3)
        dense_time, none, routed = times["dense"], times["none"], times.get("routed", times["none"])
        ideal = Samples(none.values + case.rate * (dense_time.values - none.values))
        row: dict[str, Any] = {"case": case, "dense": dense_time, "routed": routed, "speedup": dense_time / routed}
        if 0 < case.rate < 1:
            gained, possible = dense_time.values / routed.values - 1, dense_time.values / ideal.values - 1
            row["efficiency"] = Samples(gained / possible)
            row["matmul_share"] = _matmul_share(case, dense, threads, float(np.median(routed.values - ideal.values)))
        yield row


def _matmul_share(case: Case, dense: Path, threads: int, lost_milliseconds: float) -> float:
    """Of the time lost against the ideal line, the part that MatMuls take because they have fewer rows."""
    tokens = np.load(case.tokens)
    all_rows, some_rows = (mlp_matmul_seconds(graph, tokens, case.sequence, threads) for graph in (dense, case.graph))
    return (some_rows - case.rate * all_rows) * 1e3 / lost_milliseconds


def _worker(graph: Path, case: Case, threads: int) -> Worker:
    arguments = (graph, case.tokens, "--sequence", str(case.sequence), "--threads", str(threads))
    return Worker("benchmarks.onnxruntime_worker", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(BARS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    folder = smollm2_folder() if given.model == "smollm2" else random_llama_folder("random-h2048", H2048)
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        dense, cases = make_cases(folder, Path(temporary))
        rows = list(rows_of(cases, dense, EFFORTS[given.model], given.threads))
    print_report(
        f"Skip efficiency, {TITLES[given.model]}, fp32, {given.threads} threads",
        ["phase", "active", "dense, ms", "routed, ms", "speed-up", "efficiency", "bar", "loss in MatMul"],
        [_cells(row, BARS[given.model]) for row in rows],
        {
            "dtype": "float32",
            "batch": 1,
            "prompt": PROMPT,
            "effort": dataclasses.asdict(EFFORTS[given.model]),
            "warm_up": 3,
            "rows": [_record(row) for row in rows],
            "versions": versions("dlo-export", "onnxruntime", "numpy"),
        },
    )


def _cells(row: dict[str, Any], bar: float) -> list[Any]:
    case = row["case"]
    efficiency = row.get("efficiency", "")
    return [
        f"{case.phase}, {case.pattern}",
        f"{case.rate:.3f}",
        row["dense"],
        row["routed"],
        row["speedup"],
        efficiency,
        f"≥ {bar}" if efficiency and abs(case.rate - 0.5) < 0.01 else "",
        f"{row['matmul_share']:.0%}" if "matmul_share" in row else "",
    ]


def _record(row: dict[str, Any]) -> dict[str, Any]:
    case = row["case"]
    record = {"phase": case.phase, "pattern": case.pattern, "active_rate": round(case.rate, 4)}
    return record | {
        name: value.summary() if isinstance(value, Samples) else round(value, 3)
        for name, value in row.items()
        if name != "case"
    }


if __name__ == "__main__":
    main()
