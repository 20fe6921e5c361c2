"""Kernel times from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.common.onnxruntime_worker import DecoderStep


def matmul_seconds(
    projections: Collection[str], graph: Path, tokens: np.ndarray, sequence: int, threads: int, runs: int = 10
) -> float:
    """Time that one step spends in the products of all layers with these projections, the median of several runs.

    Args:
        projections: "q_proj" and the like; of several in one product, the last.
        graph: Ours: MatMuls are named after their projection, and ONNX Runtime appends what it fuses with them.
        tokens: int64 [batch, past + sequence].
        sequence: Tokens of the step.
        threads: Of the session.
        runs: Of the step.
    """
    names = tuple(projections)
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        step = DecoderStep(graph, tokens, sequence, threads, options=options)
        for _ in range(runs):
            step()
        events = json.loads(Path(step.session.end_profiling()).read_text())
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs:]
    spent = np.zeros(runs)
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name != event["name"] and name.split("/")[0].endswith(names) and event["ts"] >= starts[0]:
            spent[np.searchsorted(starts, event["ts"], side="right") - 1] += event["dur"]
    return float(np.median(spent)) / 1e6
