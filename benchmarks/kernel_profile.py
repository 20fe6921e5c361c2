"""Kernel times from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.onnxruntime_worker import DecoderStep
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, Block


def matmul_seconds(
    blocks: Collection[Block], graph: Path, tokens: np.ndarray, sequence: int, threads: int, runs: int = 10
) -> float:
    """Time that one step spends in the MatMuls of all MLPs, or attention blocks too, the median of several runs.

    Args:
        blocks: Which.
        graph: Ours: MatMuls are named after their projection.
        tokens: int64 [1, past + sequence].
        sequence: Tokens of the step.
        threads: Of the session.
        runs: Of the step.
    """
    projections = tuple(module.role for module in LLAMA_LAYER if module.block in blocks and not module.is_norm)
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
        if name != event["name"] and name.endswith(projections) and event["ts"] >= starts[0]:
            spent[np.searchsorted(starts, event["ts"], side="right") - 1] += event["dur"]
    return float(np.median(spent)) / 1e6
