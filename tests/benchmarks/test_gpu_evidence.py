"""The evidence's rows, its budget and its report; the GPU's own part is run where there is one."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_evidence
from benchmarks.gpu.evidence import BAR_MISSED, DONE, NO_GPU, Evidence
from benchmarks.gpu.evidence_bars import judge_bars
from benchmarks.gpu.genai_decode import PEER
from dlo_export.runtimes.tensorrt.gpu import find_gpu


def _rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "made.jsonl").read_text().splitlines()]


def test_evidence_writes_a_row_at_once_when_the_part_is_still_running(tmp_path: Path) -> None:
    evidence = Evidence("made", tmp_path / "out", budget_s=60)
    evidence.row("copy", tb_per_s=4.2)
    row = _rows(tmp_path / "out")[0]
    assert (row["part"], row["what"], row["passed"], row["tb_per_s"]) == ("made", "copy", None, 4.2)
    assert evidence.close() == DONE


def test_evidence_goes_on_and_fails_when_a_piece_raises(tmp_path: Path) -> None:
    evidence = Evidence("made", tmp_path, budget_s=60)
    with evidence.guard("first", dtype="bf16"):
        raise RuntimeError("illegal address")
    with evidence.guard("second"):
        evidence.row("second", passed=True)
    first, second = _rows(tmp_path)
    assert (first["passed"], first["error"], first["dtype"]) == (False, "RuntimeError: illegal address", "bf16")
    assert second["passed"] is True
    assert evidence.close() == BAR_MISSED


def test_evidence_leaves_a_piece_out_by_name_when_time_is_short(tmp_path: Path) -> None:
    evidence = Evidence("made", tmp_path, budget_s=5)
    assert evidence.fits("small", 1)
    assert not evidence.fits("large", 100)
    (row,) = _rows(tmp_path)
    assert row["what"] == "large"
    assert "needs about 100 s" in str(row["left_out"])


def test_evidence_counts_what_was_over_before_when_it_is_told(tmp_path: Path) -> None:
    evidence = Evidence("made", tmp_path, budget_s=30, begun=time.monotonic() - 20)
    assert evidence.fits("small", 1)
    assert not evidence.fits("large", 11)


def test_report_has_every_row_when_one_failed_and_one_was_cut_short(tmp_path: Path) -> None:
    evidence = Evidence("made", tmp_path, budget_s=60)
    for skipped, step_ms in ((0.5, 2.0), (0.0, 3.0)):
        evidence.row("decode", passed=True, model="8B", batch=1, skipped=skipped, step_ms=step_ms)
    with evidence.guard("broken"):
        raise ValueError("a | b")
    evidence.close()
    with (tmp_path / "made.jsonl").open("a") as file:
        file.write('{"part": "made", "what": "cut sho')
    rows = gpu_evidence.read_rows(tmp_path)
    gpu_evidence.write_report(rows, tmp_path)
    lines = (tmp_path / "evidence.md").read_text().split("\n\n")[1].splitlines()
    assert len(lines) == 2 + 3
    assert "skipped 0.5" in lines[2]
    assert "| broken | NO | error ValueError: a / b |" in lines[4]
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "decode.png").stat().st_size > 0


def _row(part: str, what: str, passed: bool | None = None, **figures: Any) -> dict[str, Any]:
    return {"part": part, "what": what, "passed": passed, **figures}


def test_a_bar_is_not_measured_when_a_way_or_a_model_is_missing() -> None:
    rows = [
        _row("kernels", "cubin, decode: against NumPy", True),
        _row("onnxruntime_parity", "parity reference_mlp_routed, fp32, masked", True),
        _row("transformers", "transformers", model="8B", form="eager", ms={"median": 20.0}),
    ]
    assert {bar.passed for bar in judge_bars([])} == {None}
    assert {bar.passed for bar in judge_bars(rows)} == {None}
    assert judge_bars(rows)[0].found == "no Triton JIT, libdlo_plugins.so by a C++ host, compute-sanitizer"


def test_bars_are_judged_by_all_rows_when_every_part_wrote_some() -> None:
    said = "libdlo_plugins.so by a C++ host under compute-sanitizer memcheck"
    efficiency = {"efficiency_removed": 0.92, "efficiency_proportional": 0.7, "efficiency_copied": 1.1}
    rows = [
        *(_row("kernels", f"{way}: against NumPy", True) for way in ("Triton JIT, decode", "cubin, decode", said)),
        _row("onnxruntime_parity", "parity reference_mlp_routed, fp32, masked", True),
        _row("onnxruntime_parity", "parity smollm2, bf16, if", None),
        _row("onnxruntime_parity", "parity --device cuda", False),
        _row("onnxruntime", "decode", model="8b", batch=1, graph="dense", step_ms=5.0),
        _row(
            "onnxruntime", "decode", True, model="8b", batch=1, skipped=0.5, step_ms=3.5, graph="routed", **efficiency
        ),
        _row("pytorch", "decode", False, model="8B", batch=1, skipped=0.0, over_dense={"median": 1.05}),
        _row("transformers", "transformers", model="8B", form="compiled", ms={"median": 4.0}),
    ]
    bars = judge_bars(rows)
    assert bars[-1].found == "1.250 of transformers' compiled, ? of onnxruntime-genai's"
    passed = {bar.what: bar.passed for bar in bars}
    assert passed["kernels against NumPy, three ways"] is True
    assert passed["8B decode in onnxruntime: skip efficiency, half of the MLPs skipped"] is True
    assert passed["8B decode in onnxruntime: all active, over dense"] is None
    assert passed["8B decode in pytorch: all active, over dense"] is False
    assert passed["ONNX Runtime on CUDA, every lowering, fp32, fp16, bf16"] is False  # ambiguous is no PASS
    assert passed["ONNX Runtime, dense bf16 decode"] is False
    other = _row("genai", f"decode onnxruntime, dense, cache in place, against onnxruntime-genai, {PEER}", ratio=0.8)
    assert judge_bars([*rows, other])[-1].passed is True


def test_evidence_command_names_the_part_when_there_is_none_of_that_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_evidence.main(["--parts", "kernels,magic", "--out", str(tmp_path / "out")]) == 2
    assert "no part 'magic'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_gpu().target is not None, reason="there is a GPU")
@pytest.mark.parametrize("part", list(gpu_evidence.PARTS))
def test_evidence_command_ends_with_4_after_what_a_cpu_can_check_when_there_is_no_gpu(
    part: str, tmp_path: Path
) -> None:
    assert gpu_evidence.main(["--parts", part, "--out", str(tmp_path), "--budget-s", "300", "--smoke"]) == NO_GPU
    assert not list(tmp_path.glob("*.jsonl"))
