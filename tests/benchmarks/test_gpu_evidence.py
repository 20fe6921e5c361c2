"""The evidence's rows, its budget and its report; the GPU's own part is run where there is one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import gpu_evidence
from benchmarks.gpu.evidence import BAR_MISSED, DONE, NO_GPU, Evidence
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
    lines = (tmp_path / "evidence.md").read_text().splitlines()
    assert len(lines) == 2 + 3
    assert "skipped 0.5" in lines[2]
    assert "| broken | NO | error ValueError: a / b |" in lines[4]
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "decode.png").stat().st_size > 0


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
