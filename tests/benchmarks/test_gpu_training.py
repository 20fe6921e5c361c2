"""The GPU's part of training as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_training import main
from benchmarks.papers.claims import claims
from benchmarks.papers.results import Results
from benchmarks.papers.skipping_cost import TEXTS, WAYS
from benchmarks.training_rate import SIDES
from tests.exporter.forked_commands import run
from tests.modeling.training_runs import save_chats
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the part is given: a model, text, tasks, routers."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny_llama(folder / "model", layers=2, vocab=BYTE_VOCABULARY, tokenizer=True)
    for name in ("text", "library/train", "library/held-out"):
        (folder / "text" / name).mkdir(parents=True)
        save_chats(folder / "text" / name / "chats.jsonl", count=8)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "parity.jsonl").write_text('{"context": "Is 2 even?", "continuation": " yes"}\n')
    options = ("--mode", "routers", "--routers", "add", "--as-adapter", "--max-steps", 1, "--trained-rate")
    data = ("--data", folder / "text" / "library" / "train")
    made = run("train", folder / "model", "-o", folder / "adapter", *data, *options)
    assert made.returncode == 0, made.stderr
    return folder


def _options(folder: Path, **others: Path) -> list[str]:
    paths = {name: folder / name for name in ("model", "text", "tasks", "adapter")} | others
    return [word for name, path in paths.items() for word in (f"--{name}", str(path))]


def test_part_ends_with_4_behind_its_checks_when_there_is_no_gpu(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([*_options(given), "--out", str(tmp_path)]) == 4
    assert "error: " in capsys.readouterr().err
    assert main([*_options(given, text=given / "tasks"), "--out", str(tmp_path)]) == 2
    assert "tasks: has no folder text" in capsys.readouterr().err
    assert main([*_options(given, adapter=given / "nothing"), "--out", str(tmp_path)]) == 2
    assert main([*_options(given), "--out", str(tmp_path), "--trial", "runs=train-dlo steps=1"]) == 2
    assert "--set steps=1: a form has no such" in capsys.readouterr().err


def test_rates_of_training_come_line_by_line_when_they_are_measured(tmp_path: Path) -> None:
    options = ("--tiny", "--batch", "2", "--sequence", "32", "--steps", "1", "--warm-up", "1", "--profile")
    options = (*options, "--turn", str(tmp_path / "turn"))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_rate", *options],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert [line["side"] for line in lines] == list(SIDES)
    (report,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert report["sides"] == lines
    assert all(line["tokens_per_second"] > 0 and line["steps"] == 1 for line in lines)
    assert lines[0]["profile"]["step_ms"] > 0


def test_claims_compare_runs_with_what_skips_as_much_when_results_are_there(tmp_path: Path) -> None:
    def measured(perplexity: float | None, active: float = 0.8) -> dict[str, object]:
        return {"all": {"perplexity": perplexity, "active": active}}

    results = Results(tmp_path)
    control = {"target": 0.8, "before": 0.7, "after": 0.83}
    results.save("train-routed-0.80", {"kind": "routed", "target": 0.8, "rate_control": control, **measured(10.0)})
    ways = {"static": measured(11.0), "random, same layers": measured(9.0), "random, every layer": measured(None)}
    ways["calibrated"] = measured(12.0)
    results.save("skipping-as-much-as-train-routed-0.80", {"of": "train-routed-0.80", **ways})
    names = ("static", "random, every layer", "calibrated")
    results.save("skipping-untrained-0.80", {text: dict.fromkeys(names, measured(11.0)) for text in TEXTS})
    own = {"trained": measured(10.0), "random, same layers": measured(13.0)}
    compared = {"domains": own, "watched": {**own, "trained": measured(12.0)}}
    results.save("skipping-as-asked-train-routed-0.80", {"of": "train-routed-0.80", "target": 0.8, **compared})
    results.save("train-deepened", {"kind": "deepened", **measured(10.0, 1.0)})
    results.save("train-dlo", {"kind": "dlo", **measured(10.4)})
    results.save("train-dus", {"kind": "dus", "diverged": "the loss of step 3 is not a finite number"})
    assert {claim.what: claim.passed for claim in claims(results)} == {
        "routed-0.80: active rate": False,
        "routed-0.80 against static": True,
        "routed-0.80 against random, same layers": False,
        "routed-0.80 against random, every layer": True,
        "routed-0.80 against calibrated": True,
        **{f"routed-0.80 against {way}, as asked, domains": True for way in WAYS},
        **{f"routed-0.80 against {way}, as asked, watched": way == "random, same layers" for way in WAYS},
        "dlo against deepened, dense": True,
        "dus converges": False,
    }
