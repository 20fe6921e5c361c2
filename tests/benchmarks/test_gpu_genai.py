"""gpu_genai as far as it goes without a GPU: both runtimes on the CPU; the builder, which takes long, is left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_genai
from benchmarks.gpu.evidence import BAR_MISSED, NO_GPU, Evidence
from benchmarks.gpu.genai_decode import DENSE, ROUTED, RUNTIMES, compared, rows_of_decode, save_graphs
from dlo_export.checkpoints.errors import InputError
from tests.tiny_models import save_tiny_llama


def test_part_checks_the_cpu_and_says_what_is_missing_when_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_genai.main(["--out", str(tmp_path)]) == NO_GPU
    assert "run it where an NVIDIA GPU is" in capsys.readouterr().err


def test_part_ends_with_4_by_name_when_genai_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu_genai.main(["--out", str(tmp_path)]) == NO_GPU
    assert "onnxruntime-genai is not installed" in capsys.readouterr().err


def test_part_names_the_folder_when_no_graphs_were_prepared_there(tmp_path: Path) -> None:
    evidence = Evidence("genai", tmp_path, 10)
    with pytest.raises(InputError, match="--prepare"):
        gpu_genai.measure(evidence, smoke=True, model=None, graphs=tmp_path / "missing")
    assert evidence.close() != BAR_MISSED


def test_genai_gives_the_tokens_of_our_runner_when_it_runs_our_artefacts(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", layers=2, head_dim=16)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    made = list(save_graphs(model, tmp_path, "cpu", builder=False))
    assert [row["passed"] for row in made] == [None] * 3, made
    theirs = list(rows_of_decode(tmp_path, "onnxruntime-genai", (DENSE, ROUTED), smoke=True, vocabulary=32))
    tokens = {DENSE: theirs[0]["tokens"], ROUTED: theirs[1]["tokens"]}

    def with_ours() -> list[dict[str, Any]]:
        names = RUNTIMES["onnxruntime"]
        ours = rows_of_decode(tmp_path, "onnxruntime", names, smoke=True, theirs=tokens, vocabulary=32)
        return [*theirs, *ours]

    rows = with_ours()
    assert all(row.get("step_ms", 0) > 0 for row in rows), rows
    said = list(compared(rows, "cpu"))
    assert [row["passed"] for row in said if "bar" in row] == [True, True]
    assert said[-1]["ratio"] > 0
    tokens[DENSE][-1] = (tokens[DENSE][-1] + 1) % 32
    assert [row["passed"] for row in compared(with_ours(), "cpu") if "bar" in row] == [True, False]
