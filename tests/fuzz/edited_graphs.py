"""Graphs of `graph_sources`, changed at random, edited by a command, and compared with what they compute."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.exporter.cli import main
from dlo_export.exporter.exit_codes import BAD_INPUT, DONE, MACHINE, PARITY_FAILED
from tests.exporter import forked_commands
from tests.fuzz.graph_changes import change_graph

KINDS: tuple[RoutingKind, ...] = ("mlp", "layer", "attention", "attention-active")
"""Of routing, each of which a source has an adapter for."""
_QUANTISED = "int4"  # begins sources without a PyTorch model: parity compares what is made of them with itself
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}
_STEPS = (5, 1, 2)  # tokens: a prompt, then more behind the cache
_HEAD_DIM = 16  # of genai's graphs
_HANGING_SECONDS = 30
_LIMITS = {resource.RLIMIT_CPU: _HANGING_SECONDS, resource.RLIMIT_AS: 12 * 2**30, resource.RLIMIT_FSIZE: 64 * 2**20}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one case.

    Attributes:
        kind: "refused" (parity FAIL is one), "inspected", "right", "unrunnable" (ONNX Runtime runs neither the changed
            graph nor what was made of it), "mended" (it runs only that: nothing to compare with), or "wrong".
        said: The command, what was changed, and what came of it.
    """

    kind: str
    said: str


def run_case(seed: int, sources: Path, folder: Path) -> Outcome:
    """Changes a copy of a graph, has a command edit it, and compares, all in a process of its own.

    Args:
        seed: Of the case.
        sources: From `graph_sources.save_sources`.
        folder: Created; kept where the case went wrong.
    """
    random = Random(f"graph {seed}")
    source = random.choice([path.name for path in sorted(sources.iterdir()) if path.name != "adapters"])
    folder.mkdir()
    shutil.copytree(sources / source, folder / "graph")
    changed = change_graph(random, folder / "graph" / "model.onnx")
    arguments = _command(random, sources / "adapters" / source, data_files=source != "optimum")
    said = f"seed {seed}, {source}: {changed}\n  dlo {' '.join(arguments)}"
    process = forked_commands.forkserver().Process(target=_edit_and_compare, args=(arguments, folder))
    process.start()
    forked_commands.join_unless_blocked(process, _HANGING_SECONDS)
    kind, why = _judged(source, process.exitcode, folder)
    if kind == "wrong":
        return Outcome(kind, f"{said}\n  {why}; kept in {folder}")
    shutil.rmtree(folder)
    return Outcome(kind, f"{said}\n  {why}")


def _command(random: Random, adapters: Path, *, data_files: bool) -> list[str]:
    if random.random() < 0.08:
        return ["inspect", "graph/model.onnx", *random.choice(((), ("--json",)))]
    kind = random.choice(("mlp", "mlp", "mlp", "mlp", *KINDS))
    options = [
        *("--lowering", random.choice(("auto", "masked", "compact", "if"))),
        *random.choice(((), (), ("--last-logits",))),
        *random.choice(((), (), ("--remove-identity",))),
        *random.choice(((), (), ("--link-weights",) if data_files else ())),
        *random.choice((("--no-parity",),) * 5 + ((),)),
        *random.choice(((),) * 12 + (("--trt",),)),
    ]
    return ["export", "graph/model.onnx", "-o", "out", "--adapter", str(adapters / kind), *options]


def _judged(source: str, exit_code: int | None, folder: Path) -> tuple[str, str]:
    """The kind of an outcome, and why."""
    report = folder / "report.json"
    if not report.is_file():
        return "wrong", f"the process ended with {exit_code}: {(folder / 'stderr').read_text()[-3000:]}"
    found = json.loads(report.read_text())
    stderr = (folder / "stderr").read_text()
    if found["code"] in (BAD_INPUT, MACHINE):
        return _judged_refusal(folder, stderr)
    if found["code"] not in (DONE, PARITY_FAILED) or exit_code != 0:
        return "wrong", f"the command ended with {found['code']}, the comparison with {exit_code}: {stderr[-3000:]}"
    if found["code"] == DONE or found["kind"] == "wrong":
        return found["kind"], found["why"]
    kept = sorted(path.name for path in folder.glob("out*"))
    if kept != ["out.failed"] or (source.startswith(_QUANTISED) and found["kind"] == "right"):
        return "wrong", f"parity failed of what is {found['kind']}, left {kept}: {stderr}"
    return "refused", stderr  # the config.json beside the graph is of another model by now


def _judged_refusal(folder: Path, stderr: str) -> tuple[str, str]:
    named = "error: " in stderr and "\nhint: " in stderr and "Traceback" not in stderr
    left = [path.name for path in folder.iterdir() if path.name.startswith((".out", "out"))]
    if named and not left:
        return "refused", stderr
    return "wrong", f"refused without a name, left {left}: {stderr}"


def _edit_and_compare(arguments: list[str], folder: Path) -> None:
    """Runs a command, then both graphs; what came of it stands in report.json."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for which, limit in _LIMITS.items():
        resource.setrlimit(which, (limit, limit))
    code: Any = None
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    report: dict[str, Any] = {"code": code, "kind": "inspected", "why": ""}
    Path("report.json").write_text(json.dumps(report))
    if code in (DONE, PARITY_FAILED) and arguments[0] == "export":
        made = Path("out" if code == DONE else "out.failed", "model.onnx")
        report["kind"], report["why"] = _compared(made, last_only="--last-logits" in arguments)
        Path("report.json").write_text(json.dumps(report))


def _compared(made: Path, *, last_only: bool) -> tuple[str, str]:
    try:
        expected = _logits(Path("graph/model.onnx"))
    except Exception as err:  # whatever ONNX Runtime says: the graph is nobody's to run
        with contextlib.suppress(Exception):
            _logits(made)
            return "mended", f"the graph itself: {str(err)[:300]}"
        return "unrunnable", str(err)[:300]
    try:
        found = _logits(made)
    except Exception as err:  # it ran before
        return "wrong", f"does not run any more: {err}"
    for step, (wanted, given) in enumerate(zip(expected, found, strict=True)):
        kept = wanted[:, -1:] if last_only else wanted
        if kept.shape != given.shape:
            return "wrong", f"step {step}: logits {given.shape}, expected {kept.shape}"
        scale = max(1.0, float(np.nanmax(np.abs(kept), initial=0.0, where=np.isfinite(kept))))
        if not np.allclose(given, kept, rtol=1e-4, atol=1e-4 * scale, equal_nan=True):
            return "wrong", f"step {step}: logits differ by {np.abs(given - kept).max()}, of {scale} at most"
    return "right", ""


def _empty_cache(shape: list[int | str | None]) -> Iterator[int]:
    """[1, kv_heads, 0, head_dim], or [1, 0]: what the graph gives no number for, genai's builder gave none for."""
    yield 1
    for axis, size in enumerate(shape[1:], 1):
        yield size if isinstance(size, int) else _HEAD_DIM if axis == 3 else 0


def _logits(path: Path) -> list[np.ndarray]:
    """Of every step, float32 [1, tokens, vocab]; of a graph with the interface of a decoder."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [value.name for value in session.get_outputs()]
    state = {
        value.name: np.zeros([*_empty_cache(value.shape)], _TYPES[value.type])
        for value in inputs
        if value.name.startswith("past_")
    }
    ids = np.random.default_rng(0).integers(0, 60, (1, sum(_STEPS)))
    found, done = [], 0
    for tokens in _STEPS:
        feeds = {
            "input_ids": ids[:, done : done + tokens],
            "attention_mask": np.ones((1, done + tokens), np.int64),
            "position_ids": np.arange(done, done + tokens)[np.newaxis],
        }
        known = {value.name: feeds[value.name] for value in inputs if value.name in feeds}
        results = dict(zip(outputs, session.run(None, known | state), strict=True))
        state = {
            name: results[name.replace("past_key_values", "present").replace("past_active", "present_active")]
            for name in state
        }
        found.append(results["logits"].astype(np.float32))
        done += tokens
    return found
