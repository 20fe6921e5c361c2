import json
import tempfile
from pathlib import Path

import pytest

from dlo_export.checkpoints.errors import MachineError
from dlo_export.exporter.evaluate import EvaluationRequest, evaluate_model
from dlo_export.exporter.progress import Reporter
from tests.exporter.forked_commands import Ended, run
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

CHOICES = (
    '{"doc_id": 0, "context": "One and", "continuation": " two", "label": 0}\n'
    '{"doc_id": 0, "context": "One and", "continuation": " six", "label": 0}\n'
)
SIZES = {"layers": 2, "vocab": BYTE_VOCABULARY}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed checkpoint, its artefact, one without tokenizer, a text and a task."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_llama(folder / "routed", **SIZES, tokenizer=True, routed=(True, True))
    save_tiny_llama(folder / "mute", **SIZES)
    (folder / "text.txt").write_text("A decoder layer, and another one behind it. " * 12)
    (folder / "task.jsonl").write_text(CHOICES)
    (folder / "wrong.jsonl").write_text(CHOICES + '{"context": "One and"}\n')
    (folder / "empty.txt").write_text("")
    exported = run("export", folder / "routed", "-o", folder / "artefact", "--no-parity")
    assert exported.returncode == 0, exported.stderr
    return folder


def evaluate(place: Path, tmp_path: Path, model: str, *options: str) -> Ended:
    arguments = [place / option if "." in option else option for option in options]
    return run("evaluate", place / model, *arguments)


def test_an_artefact_measures_as_its_checkpoint_does(place: Path, tmp_path: Path) -> None:
    options = ("--text", "text.txt", "--tasks", "task.jsonl", "--sequence", "64", "--stride", "32", "--json")
    shown = [
        evaluate(place, tmp_path, model, *options, *more)
        for model, *more in (("artefact", "--active-rate"), ("artefact",), ("routed",), ("routed", "--dense"))
    ]
    assert [each.returncode for each in shown] == [0, 0, 0, 0], shown
    exposed, shipped, checkpoint, dense = (json.loads(each.stdout) for each in shown)
    assert [each["runner"] for each in (exposed, checkpoint)] == ["onnxruntime", "torch"]
    assert [each["routed_layers"] for each in (shipped, checkpoint, dense)] == [[0, 1], [0, 1], []]
    assert shipped["texts"][0]["active_rate"] is dense["texts"][0]["active_rate"] is None
    assert exposed["texts"][0]["active_rate"] == checkpoint["texts"][0]["active_rate"]
    for key in ("nats_per_token", "perplexity", "bits_per_byte"):
        wanted = checkpoint["texts"][0][key]["value"]
        for other in (exposed, shipped):
            assert other["texts"][0][key]["value"] == pytest.approx(wanted, rel=1e-5)
        assert dense["texts"][0][key]["value"] != pytest.approx(wanted, rel=1e-3)
    assert shipped["texts"][0]["scored_tokens"] == 12 * 44 - 1
    assert shipped["tasks"][0]["chosen"] == checkpoint["tasks"][0]["chosen"]
    assert shipped["settings"] == {"context": 128, "sequence": 64, "stride": 32, "batch": None, "limit": None}


def test_dense_checkpoint_is_measured_when_its_routers_have_thresholds(place: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", **SIZES, tokenizer=True, routed=(True, True), thresholds={0: 0.3})
    ended = evaluate(place, tmp_path, str(tmp_path / "model"), "--text", "text.txt", "--dense", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["routed_layers"] == []


def test_evaluation_names_the_variable_when_there_is_no_place_for_temporary_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(MachineError, match="TMPDIR"):
        evaluate_model(EvaluationRequest(str(place / "routed"), (place / "text.txt",), ()), Reporter())


def test_tables_show_what_was_measured(place: Path, tmp_path: Path) -> None:
    shown = evaluate(place, tmp_path, "routed", "--text", "text.txt", "--tasks", "task.jsonl", "--limit", "2")
    assert shown.returncode == 0, shown.stderr
    assert "windows of 128 tokens" in shown.stdout
    assert "256" in shown.stdout  # scored tokens of two windows
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("artefact", (), "nothing to measure"),
        ("artefact", ("--text", "empty.txt"), "empty.txt: is empty"),
        ("artefact", ("--text", "missing.txt"), "missing.txt: no such file or folder"),
        ("artefact", ("--tasks", "wrong.jsonl"), "wrong.jsonl line 3: continuation is missing"),
        ("artefact", ("--text", "text.txt", "--sequence", "129"), "sequence is 129, the model's context has 128"),
        ("artefact", ("--text", "text.txt", "--stride", "200"), "stride is 200, expected 1 to the sequence's 128"),
        ("artefact", ("--text", "text.txt", "--runner", "torch"), "is an artefact, which ONNX Runtime runs"),
        ("artefact", ("--text", "text.txt", "--dense"), "--dense cannot be had on ONNX Runtime"),
        ("routed", ("--text", "text.txt", "--runner", "onnxruntime"), "has no dlo_artifact.json"),
        ("mute", ("--text", "text.txt"), "mute: has no tokenizer"),
        ("nowhere", ("--text", "text.txt"), "nowhere: no such file or folder"),
    ],
)
def test_evaluation_refuses_what_cannot_be_measured(
    place: Path, tmp_path: Path, model: str, options: tuple[str, ...], message: str
) -> None:
    ended = evaluate(place, tmp_path, model, *options)
    assert (ended.returncode, message in ended.stderr, "hint:" in ended.stderr) == (2, True, True), ended.stderr
    assert "Traceback" not in ended.stderr


def test_evaluation_ends_with_the_machines_code_when_there_is_no_such_device(place: Path, tmp_path: Path) -> None:
    ended = evaluate(place, tmp_path, "routed", "--text", "text.txt", "--device", "cuda")
    assert (ended.returncode, "PyTorch finds no CUDA device" in ended.stderr) == (4, True), ended.stderr
