"""gpu_onnxruntime as far as it goes without a GPU: all but the CUDA provider; skipped without its headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_onnxruntime
from benchmarks.gpu.decoder_edits import NORMS
from benchmarks.gpu.evidence import NO_GPU, Evidence
from dlo_export.graph_passes.spec.ops import ORT_OPS
from dlo_export.plugins.errors import PluginLibraryError
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE
from tests.plugins.ort_library import built_library


def test_part_checks_operators_and_decoders_when_there_is_no_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, ORT_LIBRARY_VARIABLE: str(built_library()), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "benchmarks.gpu_onnxruntime", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == NO_GPU, result.stderr
    rows = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    passed = [row["what"] for row in rows if row["passed"]]
    operators = [f"operator {name}" for name in ORT_OPS]
    decoders = [name for name in ("decoder, dense", "decoder, routed") for _ in NORMS]
    norms = ["norms"] * 2 * len(NORMS)
    placements = ["placement"] * 2  # dense and routed
    assert passed == [*operators, *decoders, "runner", "decoder, routed", *norms, *placements]
    timed = {(row["what"], row["graph"]) for row in rows if "step_ms" in row}
    removed = ("decode", "dense, half of its MLPs removed")
    assert {("decode", "dense"), removed, ("decode", "routed"), ("prefill", "routed")} <= timed


def test_part_asks_for_the_library_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ORT_LIBRARY_VARIABLE, raising=False)
    with pytest.raises(PluginLibraryError, match=ORT_LIBRARY_VARIABLE):
        gpu_onnxruntime.check()


def test_a_piece_that_fails_costs_its_own_rows_when_it_runs_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ORT_LIBRARY_VARIABLE, str(tmp_path / "missing.so"))
    monkeypatch.setattr(gpu_onnxruntime, "SMOKE_PIECES", {"checks": 1, "no such shape": 1})
    evidence = Evidence("onnxruntime", tmp_path, 60)
    gpu_onnxruntime.measure(evidence, smoke=True)
    pieces = ["checks", "no such shape"]
    # all captured, then all uncaptured, each with what else it wrote
    expected = [what for piece in pieces for what in (piece, f"log of {piece}")] * 2
    assert [row["what"] for row in evidence.rows] == expected
    assert all(row["passed"] is False for row in evidence.rows)
    assert all("missing.so: no such file" in row["error"] for row in evidence.rows if "error" in row)
