import json
from pathlib import Path

import pytest

from benchmarks.gpu.command_checks import rows_of_commands
from benchmarks.gpu.dense_decode_times import time_decode
from benchmarks.gpu.evidence import BAR_MISSED, NO_GPU, Evidence
from benchmarks.gpu.evidence_bars import DTYPES, MODELS
from benchmarks.gpu.evidence_processes import Process, run_processes
from benchmarks.gpu.lowering_parity import ATTENTION, DATA, NATIVE, Job, jobs, rows_of
from benchmarks.gpu_onnxruntime_parity import main, process_of
from dlo_export.runtimes.onnxruntime.providers import CPU
from tests.tiny_models import save_tiny_llama


def test_part_checks_the_cpu_and_says_what_is_missing_when_there_is_no_gpu(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--smoke"]) == NO_GPU
    assert "run it where an NVIDIA GPU is" in capsys.readouterr().err


def test_rows_say_what_a_provider_lacks_when_it_cannot_run_a_type():
    job = Job("mlp", str(DATA / "reference_mlp_routed"), "bf16", ("masked",), provider="cpu", device="cpu")
    placement, parity = rows_of(job)
    assert (placement["passed"], parity["passed"]) == (False, False)
    assert "NOT_IMPLEMENTED" in parity["error"]


@pytest.mark.parametrize("subject", ATTENTION)
def test_rows_pass_when_attention_alone_is_routed(subject: str):
    settings = ATTENTION[subject]
    job = Job(
        subject, str(DATA / "reference_mlp_routed"), "fp32", NATIVE, provider="cpu", device="cpu", settings=settings
    )
    assert [row["passed"] for row in rows_of(job)] == [True] * 6


def test_every_comparison_that_the_bar_asks_for_is_made_when_model_and_library_are_given():
    asked = {
        (name, dtype, lowering) for name, lowerings in MODELS.items() for dtype in DTYPES for lowering in lowerings
    }
    made = {
        (job.subject, job.dtype, lowering)
        for job in jobs(Path("model"), "library", smoke=False)
        for lowering in job.lowerings
    }
    assert asked <= made


def test_rows_of_a_process_are_kept_when_another_one_fails(tmp_path):
    evidence = Evidence("part", tmp_path, 100)
    model = save_tiny_llama(tmp_path / "model", layers=2)
    dense = Job("tiny", str(model), "fp32", ("none",), provider="cpu", device="cpu")
    run_processes(evidence, [process_of(dense), Process("gone", "no_such_module", fields={"kind": "parity"})], 90)
    assert evidence.close() == BAR_MISSED
    rows = [json.loads(line) for line in (tmp_path / "part.jsonl").read_text().splitlines()]
    assert [(row["what"], row["passed"]) for row in rows] == [
        ("placement tiny, fp32, none", True),
        ("parity tiny, fp32, none", True),
        ("gone", False),
    ]
    assert rows[-1]["kind"] == "parity"  # so that its bar sees it
    assert "ended with 1: " in rows[-1]["error"]
    assert "no_such_module" in rows[-1]["error"]


def test_decode_is_timed_against_transformers_when_a_model_is_given(tmp_path: Path):
    evidence = Evidence("part", tmp_path, 100)
    model = save_tiny_llama(tmp_path / "model", layers=2)
    time_decode(evidence, model, smoke=True, provider=CPU, device="cpu")
    assert [row["what"] for row in evidence.rows] == [
        "decode onnxruntime, fp32",
        "decode nodes",
        "decode transformers, static cache, fp32",
        "decode onnxruntime against transformers, static cache",
    ]
    nodes = evidence.rows[1]
    assert nodes["nodes_per_step"].keys() == {"CPUExecutionProvider"}
    assert nodes["us_per_step"]["Attention"] > 0
    assert all(row["passed"] is None for row in evidence.rows), evidence.rows


def test_commands_pass_when_no_model_with_a_tokenizer_is_given():
    assert [(row["what"], row["passed"]) for row in rows_of_commands(None, "cpu", None)] == [
        ("export --provider cpu", True),
        ("run --provider cpu", True),
        ("parity --device cpu", True),
        ("export, run: last logits", True),
        ("export, run: layers, last logits", True),
    ]
