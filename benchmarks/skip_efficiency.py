"""How much of the work that routing skips is time saved.

Efficiency = (T_dense / T − 1) / (T_dense / T_ideal − 1). T_ideal lies on the line between the dense artefact and the
same graph without anything that may be skipped and without routers (benchmarks/common/skipped_graph.py), at the
measured active rate. What may be skipped are all MLPs; with `--routing layer`, all layers; with `attention`, each
layer's query, attention and output projection, since keys and values are every token's. Routers are part of the
routed graph and decide by themselves; their weights were fitted so that they decide as a pattern wants
(benchmarks/common/routing.py):

* layers: that share of the layers runs, for all tokens (in decode there is one);
* tokens: in every layer, that share of the tokens, chosen at random.

A phase is a step: decode is one token of one sequence behind 128 tokens or `--past`, prefill 128 tokens or `--prompt`,
batch4 and batch16 are one token of as many sequences, each behind 32. With `--in-place` all graphs have a cache that is
written in place (`--static-cache`).

What the second pattern loses is mostly not overhead: a MatMul on half of the rows takes more than half of the time,
because all of its weights come from memory all the same. The last columns are the efficiency that remains when nothing
but these MatMuls is slower than ideal, from their kernel times in ONNX Runtime's profile; when attention is, too, which
runs for all queries though some tokens skip it; and when gathering rows and putting them back takes what its kernels
take: what routing could reach if routers and branches cost nothing. Decode with `--lowering if` has one that is not
calculated but measured: what the same graph reaches when its Ifs are told what to do, and no router runs.

The artefacts run in processes of their own, alternating, started anew several times, with weights in huge pages; see
benchmarks/common/workers.py and huge_pages.py. A launch's efficiency comes from the medians of its blocks' ratios; the
spread is that of launches.

With `--artefacts FOLDER` what is measured stays there, for the next call with the same arguments.

    python -m benchmarks.skip_efficiency smollm2
    python -m benchmarks.skip_efficiency h2048
    python -m benchmarks.skip_efficiency smollm2 --routing layer
    python -m benchmarks.skip_efficiency smollm2 --routing attention --lowering if --phase decode --rates 0.5
    python -m benchmarks.skip_efficiency smollm2 --phase batch4 batch16 --rates 0.5
    python -m benchmarks.skip_efficiency smollm2 --routing layer --lowering if --phase decode --past 1024 --in-place

`h2048` is a random model of hidden size 2048, intermediate size 8192 and 8 layers; it takes 9 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.given_decisions import decisions_given
from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.random_llama import H2048, random_llama_folder
from benchmarks.common.routed_artefact import active_rate, export, with_routers_of
from benchmarks.common.routing import fit_routers, layers_active, routable_model, save_routers, tokens_active
from benchmarks.common.skipped_graph import everything_skipped
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workers import Worker, alternate_workers
from benchmarks.common.workspace import kept, temporary_folder
from benchmarks.gpu.kernel_profile import kernel_seconds
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER
from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, RoutingKind, kept_projections
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.graph_passes.lowerings.registry import lowering_names

PROMPT = 128
BEFORE_BATCH = 32
AT_ONCE = 2
MOST_FITTED = 512  # tokens whose decisions are wanted; a router has 576 weights or more
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
BARS: dict[RoutingKind, dict[str, float]] = {
    "mlp": {"smollm2": 0.75, "h2048": 0.85},
    "layer": {"smollm2": 0.8, "h2048": 0.8},
    "attention": {"smollm2": 0.8, "h2048": 0.8},
    "attention-active": {"smollm2": 0.8, "h2048": 0.8},
}
BATCH_BAR = 0.85
TITLES = {"smollm2": "SmolLM2-135M", "h2048": "H=2048, I=8192, 8 layers, random weights"}
PATTERNS = {"layers": layers_active, "tokens": tokens_active}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A step that is timed.

    Attributes:
        batch: Sequences.
        sequence: Tokens of each.
        past: Tokens before them.
        pattern: Of PATTERNS, at all rates.
        also: Another one, at one half only.
    """

    batch: int
    sequence: int
    past: int
    pattern: str
    also: str | None = None

    @property
    def routed_tokens(self) -> int:
        """Of each sequence, the last ones, for which routers are fitted: all, or of too many the step's."""
        own = self.past + self.sequence
        return own if self.batch == 1 and own <= MOST_FITTED else self.sequence


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        phase: A key of the phases.
        pattern: "layers" or "tokens".
        graph: Routed accordingly.
        rate: Measured share of active pairs of token and layer.
        given: The graph with the same decisions, none of them a router's; of decode in branches.
    """

    phase: str
    pattern: str
    graph: Path
    rate: float
    given: Path | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: A key of TITLES.
        routing: What a token skips.
        lowering: Of the routed graphs.
        phases: By name.
        rates: Of RATES.
        threads: Of ONNX Runtime.
        in_place: Whether the caches are written in place.
        busy: Take the machine as it is.
    """

    model: str
    routing: RoutingKind
    lowering: str
    phases: dict[str, Phase]
    rates: tuple[float, ...]
    threads: int
    in_place: bool = False
    busy: bool = False

    @property
    def slots(self) -> int | None:
        """Of a cache that is written in place; None where it grows."""
        return max(phase.past + phase.sequence for phase in self.phases.values()) if self.in_place else None

    @property
    def skipped_projections(self) -> tuple[str, ...]:
        """Those that active tokens need only."""
        kept, blocks = kept_projections(self.routing), ROUTED_BLOCKS[self.routing]
        own = (module for module in LLAMA_LAYER if module.block in blocks and module not in kept)
        return tuple(module.role for module in own if not module.is_norm)

    def bar(self, phase: str) -> float:
        """For the efficiency at one half."""
        return BATCH_BAR if self.phases[phase].batch > 1 else BARS[self.routing][self.model]


@dataclasses.dataclass(frozen=True)
class Artefacts:
    """What a phase's rows are measured on.

    Attributes:
        dense: The artefact that nothing is routed in.
        skipped: The same without anything that may be skipped.
        active: By phase, the routed graph in which everything is active.
        tokens: By phase, .npy of the step's tokens and of those before it.
        cases: The rows.
    """

    dense: Path
    skipped: Path
    active: dict[str, Path]
    tokens: dict[str, Path]
    cases: list[Case]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        launches: Of the processes.
        blocks: Per launch.
        runs: Per block, in decode and with more than a few rows.
        settle: Runs at the start of a block that do not count, likewise.
    """

    launches: int
    blocks: int
    runs: tuple[int, int]
    settle: tuple[int, int]

    def of(self, rows: int) -> dict[str, int]:
        """Arguments of `alternate_workers` for a step of so many tokens."""
        long = rows > BEFORE_BATCH
        return {
            "launches": self.launches,
            "blocks": self.blocks,
            "runs": self.runs[long],
            "settle": self.settle[long],
        }


EFFORTS = {
    "smollm2": Effort(6, 3, runs=(16, 5), settle=(8, 2)),
    "h2048": Effort(4, 3, runs=(8, 3), settle=(4, 1)),
}
BOUNDS = ("products", "and attention", "and rows moved")
GIVEN = "without routers"
_BOUNDS_TITLE = f"bounds: {', '.join(BOUNDS)}"
ROW_MOVES = ("NonZero", "TopK", "GatherND", "ScatterND")


def phases_of(prompt: int, past: int) -> dict[str, Phase]:
    """What can be measured, by name.

    Args:
        prompt: Tokens of prefill.
        past: Tokens in front of decode.
    """
    return {
        "decode": Phase(1, 1, past, "layers"),
        "prefill": Phase(1, prompt, 0, "tokens", also="layers"),
        "batch4": Phase(4, 1, BEFORE_BATCH, "tokens"),
        "batch16": Phase(16, 1, BEFORE_BATCH, "tokens"),
    }


def make_artefacts(subject: Subject, checkpoint_folder: Path, folder: Path) -> Artefacts:
    """Exports the dense artefact and the routed one, and writes a variant per case."""
    with open_checkpoint(str(checkpoint_folder)) as checkpoint:
        model = routable_model(checkpoint.config.raw, checkpoint.tensors, subject.routing)
        layers, vocabulary = checkpoint.config.num_layers, checkpoint.config.vocab_size
    adapter = save_routers(model, folder / "adapter")
    exported = functools.partial(export, checkpoint_folder, static_cache=subject.slots)
    dense = exported(folder / "dense")
    routed = exported(folder / "routed", adapter, subject.lowering)
    in_branches = routed if subject.lowering == "if" else exported(folder / "if", adapter, "if")
    made = Artefacts(dense, everything_skipped(in_branches, "skipped"), {}, {}, [])
    for name, phase in subject.phases.items():
        count = phase.batch * (phase.past + phase.sequence)
        tokens = distinct_tokens(count, vocabulary).reshape(phase.batch, -1)
        made.tokens[name] = folder / f"{name}.npy"
        np.save(made.tokens[name], tokens)
        rates = {*subject.rates, 1.0}
        wanted = [(phase.pattern, rate) for rate in sorted(rates)]
        wanted += [(phase.also, 0.5)] if phase.also and 0.5 in rates else []
        for pattern, rate in wanted:
            decided = PATTERNS[pattern](rate, layers, phase.batch * phase.routed_tokens)
            fit_routers(model, tokens, decided)
            graph = with_routers_of(model, routed, f"{name}-{pattern}-{rate:.2f}")
            if rate == 1:
                made.active[name] = graph
            if rate in subject.rates:
                given = None
                if subject.lowering == "if" and phase.batch * phase.sequence == 1 and 0 < rate < 1:
                    given = decisions_given(graph, decided[:, -1].tolist(), f"{graph.stem}-given")
                made.cases.append(Case(name, pattern, graph, active_rate(graph, tokens, phase.sequence), given))
    return made


def model_folder(model: str) -> Path:
    """The checkpoint folder of a model; a key of TITLES."""
    return smollm2_folder() if model == "smollm2" else random_llama_folder("random-h2048", H2048)


def _kept_artefacts(subject: Subject, folder: Path) -> Artefacts:
    """Those of a folder, made on first use."""
    made = kept(
        folder,
        [subject.model, subject.routing, subject.lowering, _named(subject.phases), list(subject.rates), subject.slots],
        lambda whole: dataclasses.asdict(make_artefacts(subject, model_folder(subject.model), whole)),
    )
    active, tokens = ({name: Path(path) for name, path in made[part].items()} for part in ("active", "tokens"))
    cases = [
        Case(**{**case, "graph": Path(case["graph"]), "given": Path(case["given"]) if case["given"] else None})
        for case in made["cases"]
    ]
    return Artefacts(Path(made["dense"]), Path(made["skipped"]), active, tokens, cases)


def _named(phases: Mapping[str, Phase]) -> list[list[Any]]:
    return [[name, *dataclasses.astuple(phase)] for name, phase in sorted(phases.items())]


def rows_of(subject: Subject, made: Artefacts, effort: Effort) -> Iterator[dict[str, Any]]:
    """Measures the cases, each against the dense artefact and the one without anything that may be skipped."""
    for group in _groups(made.cases):
        phase, tokens = subject.phases[group[0].phase], made.tokens[group[0].phase]
        routed = [graph for case in group for graph in (case.graph, case.given) if graph is not None]
        graphs = {"dense": made.dense, "skipped": made.skipped, **{graph.stem: graph for graph in routed}}
        start: dict[str, Callable[[], Worker]] = {
            name: functools.partial(_worker, graph, tokens, phase, subject.threads) for name, graph in graphs.items()
        }
        times = alternate_workers(start, **effort.of(phase.batch * phase.sequence), busy=subject.busy)
        for case in group:
            yield _row(subject, case, made, effort.blocks, times)


def _groups(cases: list[Case]) -> Iterator[list[Case]]:
    """Cases of one phase that are measured together: few, since each worker holds a model."""
    for phase in dict.fromkeys(case.phase for case in cases):
        own = [case for case in cases if case.phase == phase]
        yield from (own[start : start + AT_ONCE] for start in range(0, len(own), AT_ONCE))


def _row(subject: Subject, case: Case, made: Artefacts, blocks: int, times: Mapping[str, Samples]) -> dict[str, Any]:
    dense, skipped, routed = (times[name] for name in ("dense", "skipped", case.graph.stem))
    row = {"case": case, "dense": dense, "skipped": skipped, "routed": routed, "speedup": dense / routed}
    ideal = Samples(skipped.values + case.rate * (dense.values - skipped.values))
    if case.rate == 1:
        return row
    row["efficiency"] = efficiency(dense, routed, ideal, blocks)
    if case.given is not None:
        row[GIVEN] = efficiency(dense, times[case.given.stem], ideal, blocks)
    if case.rate > 0 and row["efficiency"] is not None:
        lost = _lost_in_kernels(subject, case, made)
        bounds = [efficiency(dense, Samples(ideal.values + each), ideal, blocks) for each in np.cumsum(lost)]
        row["bounds"] = [bound.median for bound in bounds if bound is not None]
    return row


def efficiency(dense: Samples, routed: Samples, ideal: Samples, blocks: int) -> Samples | None:
    """Skip efficiency of each launch, from the medians of its blocks' ratios.

    Of each block, it would be a ratio of two small differences, which noise alone makes anything.

    Args:
        dense: Milliseconds, [launches · blocks].
        routed: Likewise.
        ideal: Likewise.
        blocks: Of a launch.

    Returns:
        One per launch; None where in one of them the ideal takes no less than the dense step: the machine was too busy.
    """
    speedup, possible = (np.median((dense / other).values.reshape(-1, blocks), axis=1) for other in (routed, ideal))
    return None if (possible <= 1).any() else Samples((speedup - 1) / (possible - 1))


def _lost_in_kernels(subject: Subject, case: Case, made: Artefacts) -> list[float]:
    """Milliseconds beyond the ideal, by BOUNDS: more than their share of rows, and what only compaction does."""
    tokens, sequence = np.load(made.tokens[case.phase]), subject.phases[case.phase].sequence
    all_rows, some_rows = (
        kernel_seconds(graph, tokens, sequence, subject.threads) for graph in (made.active[case.phase], case.graph)
    )
    projections = subject.skipped_projections

    def is_product(node: str, operator: str) -> bool:
        return operator in ("MatMul", "Gemm", "FusedMatMul") and node.endswith(projections)

    def is_attention(node: str, operator: str) -> bool:
        return operator in ("Attention", "GroupQueryAttention") and "self_attn" in ROUTED_BLOCKS[subject.routing]

    def moves_rows(node: str, operator: str) -> bool:
        return operator in ROW_MOVES

    def total(times: dict[tuple[str, str], float], belongs: Callable[[str, str], bool]) -> float:
        return sum(seconds for (node, operator), seconds in times.items() if belongs(node, operator)) * 1e3

    beyond = [total(some_rows, kind) - case.rate * total(all_rows, kind) for kind in (is_product, is_attention)]
    return [*beyond, total(some_rows, moves_rows)]


def _worker(graph: Path, tokens: Path, phase: Phase, threads: int) -> Worker:
    arguments = (graph, tokens, "--sequence", str(phase.sequence), "--threads", str(threads))
    return Worker("benchmarks.common.onnxruntime_worker", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(TITLES))
    parser.add_argument("--routing", choices=sorted(BARS), default="mlp")
    parser.add_argument("--lowering", choices=("auto", *lowering_names("onnxruntime-cpu")), default="auto")
    known = tuple(phases_of(PROMPT, PROMPT))
    parser.add_argument("--phase", choices=known, nargs="+", default=("decode", "prefill"))
    parser.add_argument("--prompt", type=int, default=PROMPT, help="Tokens of prefill, fewer than the hidden size.")
    parser.add_argument("--past", type=int, default=PROMPT, help="Tokens in front of decode.")
    parser.add_argument("--in-place", action="store_true", help="Write caches in place.")
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=RATES, help="Shares of active tokens.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launches", type=int, help="Of the processes; the model's own number unless given.")
    parser.add_argument("--busy", action="store_true", help="Do not wait for other programs, nor repeat for them.")
    parser.add_argument("--artefacts", type=Path, metavar="FOLDER", help="Keep there what is exported.")
    parser.add_argument("--prepare", action="store_true", help="Export, measure nothing; needs --artefacts.")
    given = parser.parse_args()
    use_huge_pages()
    if given.prepare and given.artefacts is None:
        parser.error("--prepare: needs --artefacts")
    phases = {name: phase for name, phase in phases_of(given.prompt, given.past).items() if name in given.phase}
    subject = Subject(
        given.model,
        given.routing,
        given.lowering,
        phases,
        tuple(sorted({*given.rates})),
        given.threads,
        in_place=given.in_place,
        busy=given.busy,
    )
    effort = EFFORTS[given.model]
    effort = dataclasses.replace(effort, launches=given.launches or effort.launches)
    with contextlib.ExitStack() as stack:
        place = given.artefacts or stack.enter_context(temporary_folder())
        made = _kept_artefacts(subject, place)
        if given.prepare:
            return
        rows = list(rows_of(subject, made, effort))
    print_report(
        f"Skip efficiency, {TITLES[given.model]}, {given.routing} routing, lowering {given.lowering}, fp32, "
        f"{given.threads} threads, {'caches in place' if given.in_place else 'growing caches'}",
        ["phase", "active", "dense, ms", "routed, ms", "speed-up", "efficiency", "bar", _BOUNDS_TITLE, GIVEN],
        [_cells(row, subject) for row in rows],
        {
            "dtype": "float32",
            "phases": {name: dataclasses.asdict(phase) for name, phase in phases.items()},
            "routing": given.routing,
            "lowering": given.lowering,
            "in_place": given.in_place,
            "effort": dataclasses.asdict(effort),
            "bounds": BOUNDS,
            "rows": [_record(row) for row in rows],
            "versions": versions("dlo-export", "onnxruntime", "numpy"),
        },
    )


def _cells(row: dict[str, Any], subject: Subject) -> list[Any]:
    case = row["case"]
    reached = row.get("efficiency", "")
    return [
        f"{case.phase}, {case.pattern}",
        f"{case.rate:.3f}",
        row["dense"],
        row["routed"],
        row["speedup"],
        "not known: too busy" if reached is None else reached,
        f"≥ {subject.bar(case.phase)}" if reached and abs(case.rate - 0.5) < 0.01 else "",
        ", ".join(f"{bound:.2f}" for bound in row.get("bounds", ())),
        row.get(GIVEN) or "",
    ]


def _record(row: dict[str, Any]) -> dict[str, Any]:
    case = row["case"]
    record = {"phase": case.phase, "pattern": case.pattern, "active_rate": round(case.rate, 4)}
    figures = {name: value.summary() for name, value in row.items() if isinstance(value, Samples)}
    return record | figures | {"bounds": [round(bound, 3) for bound in row.get("bounds", ())]}


if __name__ == "__main__":
    main()
