"""The first token behind a long prompt: time and memory, of SmolLM2-135M in fp32, against onnxruntime-genai.

Each way runs in a process of its own, as often as asked, in turns. Memory is the peak above what the process holds once
the model is loaded. onnxruntime-genai runs the graph of its own builder, whose GroupQueryAttention appends in place.

    python -m benchmarks.long_prompt --tokens 8000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.smollm2 import smollm2_folder
from benchmarks.common.workspace import temporary_folder
from benchmarks.dense_speed import build_with_genai
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.generation.generate import generate

BAR = 1.0
GENAI = "genai"
AT_ONCE = 1 << 20
# By name: the artefact, and the tokens of a step.
WAYS: dict[str, tuple[str, int]] = {
    "at-once": ("plain", AT_ONCE),
    "steps-1024": ("plain", 1024),
    "steps-512": ("plain", 512),
    "steps-256": ("plain", 256),
    "last-logits": ("last", 256),
    "static-cache": ("static", 256),
    "static-cache-at-once": ("static", AT_ONCE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ways", nargs="+", choices=(GENAI, *WAYS), default=(GENAI, *WAYS))
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="keep them there, for the next call")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, folder = arguments.one
        print(json.dumps(_measure(way, Path(folder), arguments.tokens, arguments.threads)))
        return
    with temporary_folder() as temporary:
        folder = arguments.graphs or temporary
        _make(smollm2_folder(), folder, arguments.tokens, arguments.ways)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
        for _ in range(arguments.rounds):
            for way in arguments.ways:
                found[way].append(_in_a_process(way, folder, arguments.tokens, arguments.threads))
                # Minutes lie between two of them: what was measured is not to be lost with the rest.
                print(way, json.dumps(found[way][-1]), file=sys.stderr, flush=True)
    _report(found, arguments)


def _make(model: Path, folder: Path, tokens: int, ways: list[str]) -> None:
    """The artefacts that the ways need, and genai's graph, where they are not there yet."""
    options = {"plain": {}, "last": {"last_logits": True}, "static": {"static_cache": tokens + 64}}
    for kind in {WAYS[way][0] for way in ways if way != GENAI}:
        if (folder / kind).exists():
            continue
        request = ExportRequest(str(model), folder / kind, parity=False, **options[kind])  # type: ignore[arg-type]
        export_model(request, Reporter())
    if GENAI in ways and not (folder / GENAI).exists():
        build_with_genai(model, folder / GENAI)


def _in_a_process(way: str, folder: Path, tokens: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.long_prompt", "--one", way, str(folder)]
    command += ["--tokens", str(tokens), "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _measure(way: str, folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """Seconds until the first token, on the wall and of all cores, and megabytes above the loaded model."""
    ids = np.random.default_rng(0).integers(100, 40_000, tokens)
    if way == GENAI:
        return _timed(_genai(folder / GENAI, ids, threads))
    kind, step = WAYS[way]
    with open_artefact(folder / kind, threads=threads) as runner:
        return _timed(lambda: generate(runner, [ids.tolist()], max_new_tokens=1, prefill_tokens=step))


def _genai(folder: Path, ids: np.ndarray, threads: int) -> Callable[[], object]:
    import onnxruntime_genai as og  # noqa: PLC0415 - another ONNX Runtime, which the other processes do not load

    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (folder / "genai_config.json").write_text(json.dumps(config))
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(ids) + 64)
    generator = og.Generator(model, options)

    def run() -> object:
        generator.append_tokens(ids.astype(np.int32)[np.newaxis])
        generator.generate_next_token()
        return generator

    return run


def _timed(work: Callable[[], object]) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before, start, cpu = _resident("VmRSS"), time.perf_counter(), _cpu_seconds()
    work()
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}
    return {**seconds, "megabytes": _resident("VmHWM") - before}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident(field: str) -> float:
    """Megabytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _report(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    units = ("seconds", "cpu_seconds", "megabytes")
    samples = {
        way: {unit: Samples(np.array([run[unit] for run in runs])) for unit in units} for way, runs in found.items()
    }
    peer = samples.get(GENAI)
    rows = []
    for way, own in samples.items():
        ratios = ["", ""] if peer is None else [own[unit] / peer[unit] for unit in ("seconds", "megabytes")]
        rows.append([way, own["seconds"], own["cpu_seconds"], own["megabytes"], *ratios])
    print_report(
        f"A prompt of {arguments.tokens} tokens, SmolLM2-135M, fp32, {arguments.threads} threads",
        ["way", "s", "s of all cores", "MB above the load", "time / genai", f"memory / genai (bar ≤ {BAR})"],
        rows,
        {
            "tokens": arguments.tokens,
            "dtype": "float32",
            "rounds": arguments.rounds,
            "warm_up": 0,
            "results": {way: {unit: own[unit].summary() for unit in units} for way, own in samples.items()},
            "versions": versions("dlo-export", "onnxruntime", "onnxruntime-genai"),
        },
    )


if __name__ == "__main__":
    main()
