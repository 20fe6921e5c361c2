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
from benchmarks.gpu.placement import placement_facts
from dlo_export.runtimes.tensorrt.gpu import find_gpu

NEVER_RUN = "LlamaDloForCausalLM in the kernels, from a checkpoint folder"
DATA = Path(__file__).parents[1] / "data" / "gpu_evidence"


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
        evidence.row("decode", passed=True, kind="decode", model="8B", batch=1, skipped=skipped, step_ms=step_ms)
    with evidence.guard("broken"):
        raise ValueError("a | b")
    evidence.close()
    with (tmp_path / "made.jsonl").open("a") as file:
        file.write('{"part": "made", "what": "cut sho')
    rows, faults = gpu_evidence.read_rows(tmp_path)
    gpu_evidence.write_report(rows, tmp_path, faults)
    assert faults == []
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert len(lines) == 2 + 3
    assert "skipped 0.5" in lines[2]
    assert "| broken | NO | error ValueError: a / b |" in lines[4]
    if importlib.util.find_spec("matplotlib") is not None:
        assert (tmp_path / "decode.png").stat().st_size > 0


def _measured() -> list[dict[str, Any]]:
    """What all parts said in one run on an H200: of the rows that bars are judged by, the fields that they are."""
    rows, faults = gpu_evidence.read_rows(DATA)
    assert not faults
    return rows


def _save(rows: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _without(part: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in _measured()
        if row["part"] != part or any(row.get(name) != value for name, value in fields.items())
    ]


def test_every_bar_holds_when_the_rows_are_those_of_the_documented_run() -> None:
    bars = judge_bars(_measured())
    # That run was before the model class ran in the kernels by itself.
    assert [(bar.what, bar.passed) for bar in bars if bar.passed is not True] == [(NEVER_RUN, None)]
    found = {bar.what: bar.found for bar in bars}
    assert found["ONNX Runtime, dense bf16 decode"] == "0.810 of transformers' compiled, 1.330 of onnxruntime-genai's"
    assert found["8B decode in pytorch: all active, over dense"] == "1.014"
    assert found["kernels, 256 of 512 tokens active"] == "times_cublas 1.365"


@pytest.mark.parametrize(
    ("part", "fields", "bar", "found"),
    [
        ("kernels", {"way": "compute-sanitizer"}, "kernels against NumPy, three ways", "no compute-sanitizer"),
        ("kernels", {"kind": "skipped"}, "kernels, skipped, in a graph", "no row"),
        (
            "onnxruntime",
            {"kind": "placement"},
            "ONNX Runtime on CUDA: nodes of layers elsewhere, captured 8B and every lowering",
            "no 8B dense, 8B routed",
        ),
        (
            "onnxruntime_parity",
            {"lowering": "plugin", "dtype": "fp16", "kind": "parity"},
            "ONNX Runtime on CUDA, every lowering, fp32, fp16, bf16",
            "no reference_mlp_routed in fp16, plugin, smollm2 in fp16, plugin",
        ),
        ("pytorch", {"skipped": 0.0}, "8B decode in pytorch: all active, over dense", "no row"),
    ],
)
def test_bar_is_not_measured_and_the_command_says_so_when_rows_of_its_part_are_missing(
    part: str, fields: dict[str, Any], bar: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _without(part, **fields)
    unmeasured = {judged.what: judged.found for judged in judge_bars(rows) if judged.passed is None}
    assert unmeasured.pop(NEVER_RUN) == "no float32, bfloat16"
    assert unmeasured == {bar: found}
    out = _save(rows, tmp_path / "out")
    assert gpu_evidence.main(["--out", str(out), "--report"]) == BAR_MISSED
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_measured"] == sorted(
        [bar, NEVER_RUN], key=[judged.what for judged in judge_bars([])].index
    )
    assert gpu_evidence.main(["--out", str(out), "--report", "--parts", "transformers"]) == DONE  # others are not due


def test_dense_step_is_judged_by_either_peer_when_the_other_is_missing() -> None:
    judged = [judge_bars(_without(part))[-1] for part in ("genai", "transformers")]
    assert [(bar.found, bar.passed) for bar in judged] == [
        ("0.810 of transformers' compiled, ? of onnxruntime-genai's", True),
        ("? of transformers' compiled, 1.330 of onnxruntime-genai's", False),
    ]
    assert judge_bars([])[-1].passed is None


def test_placement_fails_when_a_node_of_a_layer_is_elsewhere_or_nobody_knows() -> None:
    asked = {"model.layers.3.mlp.down_proj/MatMul": False, "model.routers.3.weight/MatMul": False, "Squeeze_4": True}
    for name, passed in asked.items():
        facts = placement_facts(
            {"CUDAExecutionProvider": [("a", "Add")], "CPU": [(name, "X")]}, "CUDAExecutionProvider"
        )
        assert (facts["passed"], facts["elsewhere"]) == (passed, {"X": 1})
    assert placement_facts({"CPUExecutionProvider": [("a", "Add")]}, "CUDAExecutionProvider")["passed"] is False
    rows = [{**row, "passed": False} if row.get("graph") == "routed" else row for row in _measured()]
    assert [bar.found for bar in judge_bars(rows) if bar.asked == "none"] == ["1 of 54 do not hold: placement"]


def test_bar_fails_when_one_of_its_comparisons_has_no_verdict_or_failed() -> None:
    for verdict in (None, False):
        rows = [{**row, "passed": verdict} if row["what"] == "parity smollm2, bf16, if" else row for row in _measured()]
        bar = next(bar for bar in judge_bars(rows) if bar.asked == "parity PASS")
        assert (bar.passed, bar.found) == (False, "1 of 52 do not hold: parity smollm2, bf16, if")


def test_report_is_written_and_fails_when_a_row_has_another_form_than_its_bar_knows(tmp_path: Path) -> None:
    rows = _measured()
    for row in rows:
        if row["kind"] == "ratio":
            del row["ratio"]
    out = _save(rows, tmp_path / "out")
    assert gpu_evidence.main(["--out", str(out), "--report"]) == BAR_MISSED
    bars = judge_bars(rows)
    assert [bar.what for bar in bars if bar.passed is False] == ["ONNX Runtime, dense bf16 decode"]
    assert bars[-1].found == "its rows cannot be read: KeyError: 'ratio'"
    assert bars[-1].found in (out / "evidence.md").read_text()
    assert len((out / "rows.md").read_text().splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{broken", "Expecting property name"),
        (b"[1, 2]", "is no JSON object"),
        (b'{"part": "kernels"}', "has no what"),
        (b'{"part": 1, "what": null}', "has no part and no what"),
        (b'{"part": "kernels", "what": "x", "passed": "maybe"}', "has a verdict of 'maybe'"),
        (b'{"part": "kernels", "what": "\xff"}', "can't decode byte 0xff"),
        (b"", "Expecting value"),
    ],
)
def test_report_has_all_other_rows_and_names_the_line_when_one_is_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, fault: str
) -> None:
    out = _save(_measured(), tmp_path / "out")
    file = out / "rows.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first + b"\n" + line + b"\n" + rest)
    assert gpu_evidence.main(["--out", str(out), "--report", "--parts", "transformers"]) == BAR_MISSED
    captured = capsys.readouterr()
    assert "rows.jsonl, line 2" in captured.err
    assert fault in captured.err
    assert len(json.loads(captured.out.splitlines()[-1])["faults"]) == 1
    assert len((out / "rows.md").read_text().splitlines()) == 2 + len(_measured())


def test_report_survives_any_row_when_its_fields_are_of_other_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _measured()
    odd = [None, "x", [1], {"a": 1}, -1, "\ud800", "a\nb | c"]
    for number, row in enumerate(rows):
        names = sorted(row.keys() - {"part", "what", "passed", "kind"})
        row[names[number % len(names)]] = odd[number % len(odd)]
        if number % 5 == 0:
            row["kind"] = odd[number // 5 % len(odd)]
    out = _save(rows, tmp_path / "out")
    assert gpu_evidence.main(["--out", str(out), "--report"]) == BAR_MISSED
    assert len((out / "rows.md").read_text().splitlines()) == 2 + len(rows)
    assert (out / "evidence.md").read_text().count("\n") == 2 + len(judge_bars([]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_measured"]


def test_report_is_refused_when_there_are_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_evidence.main(["--out", str(tmp_path / "none"), "--report"]) == 2
    assert "has no rows" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_evidence_command_names_the_part_when_there_is_none_of_that_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_evidence.main(["--parts", "kernels,magic", "--out", str(tmp_path / "out")]) == 2
    assert "no part 'magic'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evidence_command_names_the_folder_when_a_file_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert gpu_evidence.main(["--out", str(out)]) == 2
        assert f"--out {out}: is no folder, or lies in none" in capsys.readouterr().err


@pytest.mark.skipif(find_gpu().target is not None, reason="there is a GPU")
@pytest.mark.parametrize("part", list(gpu_evidence.PARTS))
def test_evidence_command_ends_with_4_after_what_a_cpu_can_check_when_there_is_no_gpu(
    part: str, tmp_path: Path
) -> None:
    assert gpu_evidence.main(["--parts", part, "--out", str(tmp_path), "--budget-s", "300", "--smoke"]) == NO_GPU
    assert not list(tmp_path.glob("*.jsonl"))
