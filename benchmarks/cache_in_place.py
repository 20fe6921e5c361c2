"""Decode on a cache that is written in place, against one that grows: dense, and with half of the layers skipped.

A growing cache is copied in every step, that of a skipped layer too, since the next step is to find it; with
`--static-cache` a step writes its own tokens' rows. SmolLM2-135M in fp32, one token behind so many others; MLPs, whole
layers or attention are skipped in every other layer (benchmarks/common/routing.py), in the lowering that is given. The
cache has slots for the longest step that is measured. Graphs are compared first: both choose the same next token.

The artefacts run in processes of their own, alternating, started anew several times; see benchmarks/common/workers.py.

    python -m benchmarks.cache_in_place
    python -m benchmarks.cache_in_place --past 4096 --routing layer --lowering if
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.routed_artefact import export, with_routers_of
from benchmarks.common.routing import fit_routers, layers_active, routable_model, save_routers
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workers import Worker, alternate_workers
from benchmarks.common.workspace import temporary_folder
from dlo_export.checkpoints.opening import open_checkpoint

DENSE = "dense"
ROUTINGS = ("mlp", "layer", "attention")
BLOCKS, RUNS, SETTLE = 3, 12, 4


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured together: the two graphs of a model.

    Attributes:
        routing: Of ROUTINGS, or DENSE.
        lowering: Of the routed graphs.
        past: Tokens in the cache.
        slots: Of the one that is written in place.
    """

    routing: str
    lowering: str
    past: int
    slots: int


def graphs_of(subject: Subject, model: Path, folder: Path) -> tuple[dict[str, Path], Path]:
    """The two graphs, by the name of their cache, and the tokens of the step and in front of it, .npy."""
    with open_checkpoint(str(model)) as checkpoint:
        config = checkpoint.config
        tokens = distinct_tokens(subject.past + 1, config.vocab_size).reshape(1, -1)
        np.save(folder / "tokens.npy", tokens)
        caches = {"growing": None, "in place": subject.slots}
        if subject.routing == DENSE:
            dense = {name: export(model, folder / name, static_cache=slots) for name, slots in caches.items()}
            return dense, folder / "tokens.npy"
        routed = routable_model(config.raw, checkpoint.tensors, subject.routing)  # type: ignore[arg-type]  # of ROUTINGS
        fit_routers(routed, tokens, layers_active(0.5, config.num_layers, 1))
    adapter = save_routers(routed, folder / "adapter")
    made = {
        name: export(model, folder / name, adapter, subject.lowering, static_cache=slots)
        for name, slots in caches.items()
    }
    return {name: with_routers_of(routed, graph, "fitted") for name, graph in made.items()}, folder / "tokens.npy"


def measure(subject: Subject, model: Path, threads: int, launches: int, *, busy: bool) -> dict[str, Samples]:
    """Milliseconds of a step, by the name of its cache.

    Raises:
        RuntimeError: The two choose different tokens.
    """
    with temporary_folder() as folder:
        graphs, tokens = graphs_of(subject, model, folder)
        chosen: dict[str, set[int]] = {name: set() for name in graphs}

        def started(name: str) -> Worker:
            arguments = (graphs[name], tokens, "--sequence", "1", "--threads", str(threads))
            worker = Worker("benchmarks.common.onnxruntime_worker", *arguments)
            chosen[name].add(worker.facts["next_token"])
            return worker

        start: dict[str, Callable[[], Worker]] = {name: functools.partial(started, name) for name in graphs}
        times = alternate_workers(start, launches=launches, blocks=BLOCKS, runs=RUNS, settle=SETTLE, busy=busy)
    if len(set.union(*chosen.values())) != 1:
        raise RuntimeError(f"{subject}: the next token is {chosen}")
    return dict(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", type=int, nargs="+", default=(128, 1024, 4096), help="Tokens in the cache.")
    parser.add_argument("--routing", choices=(DENSE, *ROUTINGS), nargs="+", default=(DENSE, *ROUTINGS))
    parser.add_argument("--lowering", default="if", help="Of the routed graphs.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--busy", action="store_true", help="Do not wait for other programs, nor repeat for them.")
    given = parser.parse_args()
    use_huge_pages()
    model, slots = smollm2_folder(), max(given.past) + 1
    rows = []
    for routing in given.routing:
        for past in given.past:
            subject = Subject(routing, given.lowering, past, slots)
            times = measure(subject, model, given.threads, given.launches, busy=given.busy)
            rows.append((subject, times, times["in place"] / times["growing"]))
    print_report(
        f"Decode of SmolLM2-135M, fp32, {given.threads} threads: a cache of {slots} slots written in place",
        ["what skips", "behind", "growing, ms", "in place, ms", "in place / growing"],
        [
            [
                subject.routing if subject.routing == DENSE else f"{subject.routing}, {subject.lowering}, half",
                subject.past,
                times["growing"],
                times["in place"],
                ratio,
            ]
            for subject, times, ratio in rows
        ],
        {
            "dtype": "float32",
            "slots": slots,
            "rows": [
                dataclasses.asdict(subject)
                | {name: value.summary() for name, value in times.items()}
                | {"ratio": ratio.summary()}
                for subject, times, ratio in rows
            ],
            "versions": versions("dlo-export", "onnxruntime", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
