"""The plugin lowering against compaction, on ONNX Runtime's CPU provider.

Both graphs have the same routers and weights. Compaction gathers the active rows, multiplies them with ONNX Runtime's
own MatMuls, and adds them back in place; the plugin lowering is two operators of libdlo_ort.so per routed layer. Ratios
are times of the plugin lowering over compaction's, block by block: below 1 it is the faster one. Cases and patterns are
those of benchmarks/skip_efficiency.py, and so is how they run. The last logits of both graphs are compared before
anything is timed. With `--artefacts FOLDER` the graphs stay there, for the next call.

    make -C plugins/library ORT_INCLUDE=/path/to/onnxruntime/include DLO_TARGETS=none
    python -m benchmarks.ort_plugin smollm2 plugins/library/build/libdlo_ort.so

`h2048` takes 6 GB of disk and 9 of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.common.arguments import existing_file
from benchmarks.common.huge_pages import use_huge_pages
from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.onnxruntime_worker import DecoderStep
from benchmarks.common.routed_artefact import active_rate, export, with_routers_of
from benchmarks.common.routing import fit_routers, layers_active, routable_model, save_routers, tokens_active
from benchmarks.common.smollm2 import distinct_tokens
from benchmarks.common.workers import Worker, alternate_workers
from benchmarks.common.workspace import kept, temporary_folder
from benchmarks.skip_efficiency import EFFORTS, PROMPT, TITLES, model_folder
from dlo_export.checkpoints.interface import LOGITS
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.plugins.ort_registration import register_library

PATTERNS = {"layers": layers_active, "tokens": tokens_active}
RATES = (0.25, 0.5, 0.75)
CASES = [(phase, pattern, rate) for phase, pattern in (("decode", "layers"), ("prefill", "tokens")) for rate in RATES]
CASES += [("prefill", "layers", rate) for rate in RATES]
NEAR = 1e-3  # of the largest logit, which sums of another order reach over 30 layers


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        phase: "decode" or "prefill".
        pattern: A key of PATTERNS.
        active_rate: Measured share of active pairs of token and layer.
        tokens: .npy of the step's tokens and of those before it.
        graphs: .onnx by lowering.
    """

    phase: str
    pattern: str
    active_rate: float
    tokens: str
    graphs: dict[str, str]

    @property
    def sequence(self) -> int:
        """Tokens of the step."""
        return 1 if self.phase == "decode" else PROMPT


def make_cases(checkpoint_folder: Path, library: Path, threads: int, folder: Path) -> list[Case]:
    """Exports both graphs, and writes and compares a variant of each per case."""
    with open_checkpoint(str(checkpoint_folder)) as checkpoint:
        model = routable_model(checkpoint.config.raw, checkpoint.tensors)
        layers, vocabulary = checkpoint.config.num_layers, checkpoint.config.vocab_size
    tokens = distinct_tokens(PROMPT + 1, vocabulary)
    files = {"decode": folder / "decode.npy", "prefill": folder / "prefill.npy"}
    np.save(files["decode"], tokens)
    np.save(files["prefill"], tokens[:, :PROMPT])
    adapter = save_routers(model, folder / "adapter")
    graphs = {name: export(checkpoint_folder, folder / name, adapter, name) for name in ("compact", "plugin")}
    made = []
    for phase, pattern, rate in CASES:
        fit_routers(model, tokens, PATTERNS[pattern](rate, layers, PROMPT + 1))
        routed = {name: with_routers_of(model, graph, f"{phase}-{pattern}-{rate}") for name, graph in graphs.items()}
        case = Case(phase, pattern, 0, str(files[phase]), {name: str(graph) for name, graph in routed.items()})
        _compare(routed, library, np.load(case.tokens), case.sequence, threads)
        active = active_rate(routed["compact"], np.load(case.tokens), case.sequence)
        made.append(dataclasses.replace(case, active_rate=round(active, 4)))
    return made


def rows_of(cases: list[Case], library: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures every case."""
    effort = EFFORTS[given.model]
    effort = dataclasses.replace(effort, launches=given.launches or effort.launches)
    for case in cases:
        arguments = (case.tokens, "--sequence", str(case.sequence), "--threads", str(given.threads))
        module, graphs = "benchmarks.common.onnxruntime_worker", case.graphs
        times = alternate_workers(
            {
                "compact": functools.partial(Worker, module, graphs["compact"], *arguments),
                "plugin": functools.partial(Worker, module, graphs["plugin"], *arguments, "--plugin-library", library),
            },
            **effort.of(case.sequence),
            busy=given.busy,
        )
        yield {
            "phase": case.phase,
            "pattern": case.pattern,
            "active_rate": case.active_rate,
            **times,
            "ratio": times["plugin"] / times["compact"],
        }


def _kept_cases(model: str, library: Path, threads: int, folder: Path) -> list[Case]:
    """Those of a folder, made on first use."""

    def make(whole: Path) -> list[dict[str, Any]]:
        return [dataclasses.asdict(case) for case in make_cases(model_folder(model), library, threads, whole)]

    return [Case(**case) for case in kept(folder, model, make)]


def _compare(graphs: dict[str, Path], library: Path, tokens: np.ndarray, sequence: int, threads: int) -> None:
    """Refuses to time graphs that do not compute the same."""
    logits = {}
    for name, graph in graphs.items():
        options = ort.SessionOptions()
        if name == "plugin":
            register_library(options, library)
        step = DecoderStep(graph, tokens, sequence, threads, spinning=False, options=options)
        step()
        logits[name] = step.outputs()[LOGITS][0, -1]
    error = np.abs(logits["plugin"] - logits["compact"]).max() / np.abs(logits["compact"]).max()
    if not error <= NEAR:
        raise RuntimeError(f"the last logits differ by {error:.1e} of the largest one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(TITLES))
    parser.add_argument("library", type=existing_file, help="libdlo_ort.so")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--busy", action="store_true", help="do not wait for other programs, nor repeat for them")
    parser.add_argument("--launches", type=int, help="of the processes, per case; the model's own number unless given")
    parser.add_argument("--artefacts", type=Path, metavar="FOLDER", help="keep there what is exported")
    parser.add_argument("--prepare", action="store_true", help="export, measure nothing; needs --artefacts")
    given = parser.parse_args()
    use_huge_pages()
    if given.prepare and given.artefacts is None:
        parser.error("--prepare: needs --artefacts")
    library = given.library
    with contextlib.ExitStack() as stack:
        place = given.artefacts or stack.enter_context(temporary_folder())
        cases = _kept_cases(given.model, library, given.threads, place)
        if given.prepare:
            return
        rows = []
        for row in rows_of(cases, library, given):
            print(f"{row['phase']}, {row['pattern']}, {row['active_rate']:.3f}: {row['ratio']}", file=sys.stderr)
            rows.append(row)
    print_report(
        f"Plugin lowering against compaction, {TITLES[given.model]}, fp32, {given.threads} threads",
        ["phase", "active", "compact, ms", "plugin, ms", "plugin / compact"],
        [
            [
                f"{row['phase']}, {row['pattern']}",
                f"{row['active_rate']:.3f}",
                *(row[key] for key in ("compact", "plugin", "ratio")),
            ]
            for row in rows
        ],
        {
            "prompt": PROMPT,
            "busy": given.busy,
            "launches": given.launches,
            "rows": [
                {key: value.summary() if isinstance(value, Samples) else value for key, value in row.items()}
                for row in rows
            ],
            "versions": versions("dlo-export", "onnxruntime", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
