"""onnxruntime-genai on a GPU beside our runner: tokens of the same artefacts, and a dense decode step of each.

    python -m benchmarks.gpu_genai --out DIR [--model MODEL]
    python -m benchmarks.gpu_genai --prepare GRAPHS [--model MODEL]     # the half a minute that needs no GPU, before
    python -m benchmarks.gpu_genai --out DIR --graphs GRAPHS

Prepared are a small routed artefact, and of a model in bfloat16 (without --model a random one: hidden size 2048,
intermediate size 8192, 8 layers) an artefact with a cache that grows, one with a cache in place, and what
onnxruntime-genai's own builder makes of the same weights for CUDA, captured. Each runtime then has the GPU to itself,
in a process of its own: 64 greedy tokens behind a prompt of 128, each known to the host before the next one. Ours runs
last, and says of onnxruntime-genai's tokens how far they are from what it would have taken.

Without a GPU the routed artefact's tokens are compared on the CPU. Exit codes as benchmarks/gpu/evidence.py has them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.evidence import BAR_MISSED, DONE, Evidence, run_part
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.genai_decode import RUNTIMES, Runtime, compared, rows_of_decode, save_graphs
from dlo_export.checkpoints.errors import InputError, MachineError

PROGRAM = "gpu_genai"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--graphs", type=Path)
    parser.add_argument("--job", type=json.loads)
    own, others = parser.parse_known_args(arguments)
    if own.prepare is not None:
        own.prepare.mkdir(parents=True, exist_ok=True)
        return _say(save_graphs(own.model, own.prepare, "cuda"))
    if own.job is not None:
        _say(rows_of_decode(Path(own.job.pop("folder")), **own.job))
        return DONE
    return run_part("genai", __doc__, check, functools.partial(measure, model=own.model, graphs=own.graphs), others)


def check() -> None:
    """The routed artefact in both runtimes, on the CPU.

    Raises:
        MachineError: onnxruntime-genai is not installed.
        InputError: Tokens differ, or one of them does not run it.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MachineError(
            "onnxruntime-genai is not installed",
            hint="pip install onnxruntime-genai-cuda, or leave genai out of --parts",
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = list(save_graphs(None, folder, "cpu", routed_alone=True))
        for runtime, names in RUNTIMES.items():
            rows += rows_of_decode(folder, runtime, names, smoke=True, theirs=_tokens(rows))
        rows += compared(rows, "cpu")
    if failed := [row for row in rows if row["passed"] is False]:
        raise InputError(f"on the CPU: {failed}", hint="the graphs are wrong, or one of the runtimes is")


def measure(evidence: Evidence, smoke: bool, *, model: Path | None, graphs: Path | None) -> None:
    """Both runtimes, one after the other.

    Raises:
        InputError: `graphs` is no folder.
    """
    if graphs is not None and not graphs.is_dir():
        raise InputError(f"--graphs {graphs}: no such folder", hint="make one with --prepare")
    with tempfile.TemporaryDirectory() as temporary:
        if graphs is None:
            for row in save_graphs(model, Path(temporary), "cuda"):
                evidence.row(**row)
        folder = str(graphs.absolute() if graphs else temporary)
        for runtime, names in RUNTIMES.items():
            _run(evidence, folder, runtime, names, smoke)
            # What ends the process costs the graphs behind it: each of them once more, by itself.
            said = {(row.get("runtime"), row.get("graph")) for row in evidence.rows}
            for name in names:
                if (runtime, name) not in said and evidence.fits(f"{runtime}, {name} alone", 20):
                    _run(evidence, folder, runtime, (name,), smoke)
    for row in compared(evidence.rows, "cuda"):
        evidence.row(**row)


def _run(evidence: Evidence, folder: str, runtime: Runtime, names: Sequence[str], smoke: bool) -> None:
    job = {"folder": folder, "runtime": runtime, "names": names, "smoke": smoke, "theirs": _tokens(evidence.rows)}
    seconds = evidence.left - (0 if runtime == "onnxruntime" else 20)
    run_processes(evidence, [Process(f"{runtime}, {', '.join(names)}", PROGRAM, ("--job", json.dumps(job)))], seconds)


def _tokens(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """onnxruntime-genai's, by the name of the graph."""
    return {
        row["graph"]: row["tokens"] for row in rows if row.get("runtime") == "onnxruntime-genai" and "tokens" in row
    }


def _say(rows: Iterator[dict[str, Any]]) -> int:
    """Prints them as they come; whether one failed."""
    code = DONE
    for row in rows:
        print(json.dumps(row), flush=True)
        code = BAR_MISSED if row["passed"] is False else code
    return code


if __name__ == "__main__":
    sys.exit(main())
