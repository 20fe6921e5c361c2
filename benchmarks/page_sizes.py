"""A dense step with weights in pages of 4 KiB, as allocators give them, and in huge pages, as glibc does when asked.

The same artefact of SmolLM2-135M, in processes that differ in one environment variable (printed with the result):
decode of one token behind 128, and a prefill of 128. Nothing of it is ours: any program that loads weights into memory
of its own can be started so.

    python -m benchmarks.page_sizes
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.huge_pages import ENVIRONMENT
from benchmarks.common.measure import print_report, versions
from benchmarks.common.routed_artefact import export
from benchmarks.common.smollm2 import distinct_tokens, smollm2_folder
from benchmarks.common.workers import Worker, alternate_workers
from benchmarks.common.workspace import temporary_folder
from dlo_export.runtimes.artefact.description import MODEL_NAME

PROMPT = 128
PHASES = {"decode": (PROMPT, 1), "prefill": (0, PROMPT)}  # tokens before the step, and its own
PAGES: dict[str, dict[str, str]] = {"4 KiB": {}, "huge": ENVIRONMENT}
BLOCKS, RUNS, SETTLE = 3, {"decode": 16, "prefill": 5}, {"decode": 8, "prefill": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--launches", type=int, default=8)
    parser.add_argument("--busy", action="store_true", help="do not wait for other programs, nor repeat for them")
    parser.add_argument("--artefact", type=Path, metavar="FOLDER", help="an export of SmolLM2-135M; made unless given")
    given = parser.parse_args()
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    with temporary_folder() as folder:
        graph = given.artefact / MODEL_NAME if given.artefact else export(smollm2_folder(), folder / "dense")
        for phase, (past, sequence) in PHASES.items():
            tokens = folder / f"{phase}.npy"
            np.save(tokens, distinct_tokens(past + sequence))
            arguments = (graph.resolve(), tokens, "--sequence", str(sequence), "--threads", str(given.threads))
            start = {
                pages: functools.partial(
                    Worker, "benchmarks.common.onnxruntime_worker", *arguments, environment=environment
                )
                for pages, environment in PAGES.items()
            }
            times = alternate_workers(
                start,
                launches=given.launches,
                blocks=BLOCKS,
                runs=RUNS[phase],
                settle=SETTLE[phase],
                busy=given.busy,
            )
            ratio = times["huge"] / times["4 KiB"]
            rows.append([phase, *times.values(), ratio])
            record[phase] = {pages: samples.summary() for pages, samples in times.items()} | {"ratio": ratio.summary()}
    print_report(
        f"A dense step by the pages that weights lie in, SmolLM2-135M, fp32, {given.threads} threads",
        ["phase", *(f"{pages} pages, ms" for pages in PAGES), "huge / 4 KiB"],
        rows,
        {
            "environment": ENVIRONMENT,
            "launches": given.launches,
            "results": record,
            "versions": versions("dlo-export", "onnxruntime"),
        },
    )


if __name__ == "__main__":
    main()
