"""How much of the work that routing skips is time saved.

Efficiency = (T_dense / T − 1) / (T_dense / T_ideal − 1). T_ideal lies on the line between the dense artefact and the
routed one that skips every MLP (with `--routing layer`, every layer; with `attention`, every attention), at the
measured active rate. Decode is one token
of batch 1 behind 128 tokens; prefill is 128 tokens. Routers are part of the graph and decide by themselves; their
weights were fitted so that they decide as a pattern wants (benchmarks/routing.py):

* layers: that share of the layers runs, for all tokens (in decode there is one);
* tokens: in every layer, that share of the tokens, chosen at random.

What the second pattern loses is mostly not overhead: a MatMul on half of the rows takes more than half of the time,
because all of its weights come from memory all the same. The last column is the efficiency that remains when nothing
but these MatMuls is slower than ideal, from their kernel times in ONNX Runtime's profile: what routing and compaction
could reach if they cost nothing.

Dense, all-skipped and routed artefact run in processes of their own, alternating, started anew several times; see
benchmarks/workers.py.

    python -m benchmarks.skip_efficiency smollm2
    python -m benchmarks.skip_efficiency h2048
    python -m benchmarks.skip_efficiency smollm2 --routing layer
    python -m benchmarks.skip_efficiency smollm2 --routing layer --lowering if --phase decode --rates 0.5

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

from benchmarks.kernel_profile import matmul_seconds
from benchmarks.measure import Samples, print_report, versions
from benchmarks.random_llama import H2048, random_llama_folder
from benchmarks.routed_artefact import active_rate, export, with_routers_of
from benchmarks.routing import fit_routers, layers_active, routable_model, save_routers, tokens_active
from benchmarks.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.workers import Worker, alternate_workers
from benchmarks.workspace import WORKSPACE
from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, RoutingKind
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.graph_passes.lowerings.registry import lowering_names

PROMPT = 128
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
PHASES = ("decode", "prefill")
BARS: dict[RoutingKind, dict[str, float]] = {
    "mlp": {"smollm2": 0.75, "h2048": 0.85},
    "layer": {"smollm2": 0.8, "h2048": 0.8},
    "attention": {"smollm2": 0.8, "h2048": 0.8},
    "attention-active": {"smollm2": 0.8, "h2048": 0.8},
}
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
        rate: Measured share of active pairs of token and layer.
    """

    phase: str
    pattern: str
    graph: Path
    tokens: Path
    sequence: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: A key of TITLES.
        routing: What a token skips.
        lowering: Of the routed graphs.
        phases: Of PHASES.
        rates: Of RATES, 0 among them: what the ideal is measured by.
        threads: Of ONNX Runtime.
    """

    model: str
    routing: RoutingKind
    lowering: str
    phases: tuple[str, ...]
    rates: tuple[float, ...]
    threads: int


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        launches: Of the processes.
        blocks: Per launch.
        runs: Per block, by phase.
        settle: Runs at the start of a block that do not count, by phase.
    """

    launches: int
    blocks: int
    runs: dict[str, int]
    settle: dict[str, int]


EFFORTS = {
    "smollm2": Effort(4, 4, runs={"decode": 20, "prefill": 5}, settle={"decode": 15, "prefill": 3}),
    "h2048": Effort(3, 4, runs={"decode": 8, "prefill": 3}, settle={"decode": 6, "prefill": 1}),
}


def make_cases(subject: Subject, model_folder: Path, folder: Path) -> tuple[Path, list[Case]]:
    """Exports the dense artefact and the routed one, and writes a variant per case; returns the dense graph first."""
    with open_checkpoint(str(model_folder)) as checkpoint:
        model = routable_model(checkpoint.config.raw, checkpoint.tensors, subject.routing)
        layers, vocabulary = checkpoint.config.num_layers, checkpoint.config.vocab_size
    tokens = distinct_tokens(PROMPT + 1, vocabulary)
    files = {"decode": folder / "decode.npy", "prefill": folder / "prefill.npy"}
    np.save(files["decode"], tokens)
    np.save(files["prefill"], tokens[:, :PROMPT])
    dense = export(model_folder, folder / "dense")
    routed = export(model_folder, folder / "routed", save_routers(model, folder / "adapter"), subject.lowering)
    patterns = {"layers": layers_active, "tokens": tokens_active}
    wanted = [("decode", "layers", rate) for rate in subject.rates]
    wanted += [("prefill", "tokens", rate) for rate in subject.rates]
    cases = []
    for phase, pattern, rate in [*wanted, ("prefill", "layers", 0.5)]:
        if phase not in subject.phases:
            continue
        graph = routed.with_name(f"{pattern}-{rate:.2f}.onnx")
        if not graph.exists():
            fit_routers(model, tokens, patterns[pattern](rate, layers, PROMPT + 1))
            with_routers_of(model, routed, graph.stem)
        sequence = 1 if phase == "decode" else PROMPT
        decided = active_rate(graph, np.load(files[phase]), sequence)
        cases.append(Case(phase, pattern, graph, files[phase], sequence, decided))
    return dense, cases


def rows_of(subject: Subject, cases: list[Case], dense: Path) -> Iterator[dict[str, Any]]:
    """Measures the cases, each against the dense artefact and the all-skipped one of its phase."""
    effort = EFFORTS[subject.model]
    nothing = {case.phase: case for case in cases if case.rate == 0}
    for case in cases:
        graphs = {"dense": dense, "none": nothing[case.phase].graph, "routed": case.graph}
        if case.rate == 0:
            del graphs["routed"]
        start: dict[str, Callable[[], Worker]] = {
            name: functools.partial(_worker, graph, case, subject.threads) for name, graph in graphs.items()
        }
        times = alternate_workers(
            start,
            launches=effort.launches,
            blocks=effort.blocks,
            runs=effort.runs[case.phase],
            settle=effort.settle[case.phase],
        )
        dense_time, none, routed = times["dense"], times["none"], times.get("routed", times["none"])
        row: dict[str, Any] = {"case": case, "dense": dense_time, "routed": routed, "speedup": dense_time / routed}
        if 0 < case.rate < 1:
            ideal = Samples(none.values + case.rate * (dense_time.values - none.values))
            row["efficiency"] = _efficiency(dense_time, routed, ideal)
            slower_matmuls = Samples(ideal.values + _lost_in_matmul(subject, case, dense))
            row["matmul_bound"] = _efficiency(dense_time, slower_matmuls, ideal).median
        yield row


def _efficiency(dense: Samples, routed: Samples, ideal: Samples) -> Samples:
    return Samples((dense.values / routed.values - 1) / (dense.values / ideal.values - 1))


def _lost_in_matmul(subject: Subject, case: Case, dense: Path) -> float:
    """Milliseconds that the routed blocks' MatMuls take beyond their share of rows."""
    tokens, blocks = np.load(case.tokens), ROUTED_BLOCKS[subject.routing]
    all_rows = matmul_seconds(blocks, dense, tokens, case.sequence, subject.threads)
    some_rows = matmul_seconds(blocks, case.graph, tokens, case.sequence, subject.threads)
    return (some_rows - case.rate * all_rows) * 1e3


def _worker(graph: Path, case: Case, threads: int) -> Worker:
    arguments = (graph, case.tokens, "--sequence", str(case.sequence), "--threads", str(threads))
    return Worker("benchmarks.onnxruntime_worker", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(TITLES))
    parser.add_argument("--routing", choices=sorted(BARS), default="mlp")
    parser.add_argument("--lowering", choices=("auto", *lowering_names("onnxruntime-cpu")), default="auto")
    parser.add_argument("--phase", choices=PHASES, help="Measure one only.")
    parser.add_argument(
        "--rates", type=float, nargs="+", choices=RATES, default=RATES, help="Shares of active tokens; 0 is always one."
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    phases = PHASES if given.phase is None else (given.phase,)
    rates = tuple(rate for rate in RATES if rate == 0 or rate in given.rates)
    subject = Subject(given.model, given.routing, given.lowering, phases, rates, given.threads)
    folder = smollm2_folder() if given.model == "smollm2" else random_llama_folder("random-h2048", H2048)
    with tempfile.TemporaryDirectory(dir=WORKSPACE) as temporary:
        dense, cases = make_cases(subject, folder, Path(temporary))
        rows = list(rows_of(subject, cases, dense))
    print_report(
        f"Skip efficiency, {TITLES[given.model]}, {given.routing} routing, lowering {given.lowering}, fp32, "
        f"{given.threads} threads",
        ["phase", "active", "dense, ms", "routed, ms", "speed-up", "efficiency", "bar", "MatMul's bound"],
        [_cells(row, BARS[given.routing][given.model]) for row in rows],
        {
            "dtype": "float32",
            "batch": 1,
            "prompt": PROMPT,
            "routing": given.routing,
            "lowering": given.lowering,
            "effort": dataclasses.asdict(EFFORTS[given.model]),
            "warm_up": EFFORTS[given.model].settle,
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
        f"{row['matmul_bound']:.2f}" if "matmul_bound" in row else "",
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
