"""Kernel times from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.common.onnxruntime_worker import DecoderStep


def kernel_seconds(
    graph: Path, tokens: np.ndarray, sequence: int, threads: int, runs: int = 10
) -> dict[tuple[str, str], float]:
    """Time that one step spends in each node, the median of several runs.

    Args:
        graph: A .onnx.
        tokens: int64 [batch, past + sequence].
        sequence: Tokens of the step.
        threads: Of the session.
        runs: Of the step.

    Returns:
        Seconds by name and operator, of branches that ran, too, and of their If besides. ONNX Runtime appends to a name
        what it fuses with a node; that is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        step = DecoderStep(graph, tokens, sequence, threads, options=options)
        for _ in range(runs):
            step()
        events = json.loads(Path(step.session.end_profiling()).read_text())
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs:]
    spent: dict[tuple[str, str], np.ndarray] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name == event["name"] or event.get("cat") != "Node" or event["ts"] < starts[0]:
            continue
        times = spent.setdefault((name.split("/")[0], event["args"]["op_name"]), np.zeros(runs))
        times[np.searchsorted(starts, event["ts"], side="right") - 1] += event["dur"]
    return {node: float(np.median(times)) / 1e6 for node, times in spent.items()}
