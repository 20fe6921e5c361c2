"""The papers' experiments: the whole command on a tiny model, and its parts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.papers import training
from benchmarks.papers.budget import Budget, Piece, run_pieces
from benchmarks.papers.documents import docstrings, plain_documents
from benchmarks.papers.experiment import Experiment
from benchmarks.papers.flops import training_flops
from benchmarks.papers.forms import FORMS, with_values
from benchmarks.papers.functions import function_chats
from benchmarks.papers.moe import ExpertMlp, upcycle
from benchmarks.papers.removal import greedily, without_layers
from benchmarks.papers.report import write_tables
from benchmarks.papers.results import Results
from benchmarks.papers.skipping_cost import AS_ASKED, TEXTS, compared_as_asked
from benchmarks.papers.sources import Unit, is_permissive, library_units
from benchmarks.papers.subjects import BaseModel, expansions
from benchmarks.papers.tables import KEPT_WITHIN
from benchmarks.papers.text import DOMAINS, HELD_OUT, TRAINING, domain_file, use_other_chats
from benchmarks.papers.token_kinds import KINDS, token_kinds
from benchmarks.papers.training import planned_steps, training_runs
from benchmarks.reproduce_papers import main
from dlo_export.checkpoints.errors import InputError
from dlo_export.modeling.calibration.evaluation import evaluate, with_routers
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.parameters import choose_parameters
from dlo_export.modeling.training.settings import TrainingSettings
from tests.modeling.training_runs import opened, packed, save_chats, save_routed
from tests.tiny_models import save_tiny_llama

REPOSITORY = Path(__file__).parents[2]
BUDGET_S = 900
# Half as long sequences as the form has, half as many tokens to train and measure on; one core, since tests share two.
QUICK = (
    "--quick",
    "--held-out-tokens",
    "512",
    "--set",
    "sequence=128",
    "tokens=2048",
    "curve_points=1",
    "--threads",
    "1",
)


def _save_task(folder: Path) -> Path:
    """A task that nobody can do without knowing numbers."""
    folder.mkdir()
    lines = [
        {"doc_id": number, "context": f"Is {number} even?", "continuation": answer, "label": number % 2}
        for number in range(8)
        for answer in (" yes", " no")
    ]
    (folder / "parity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The output of the quick form, and its JSON line."""
    output = tmp_path_factory.mktemp("papers") / "results"
    folders = {"--output": output, "--publish": output / "published", "--tasks": _save_task(output.with_name("tasks"))}
    command = [sys.executable, "-m", "benchmarks.reproduce_papers", *QUICK, "--budget-s", str(BUDGET_S)]
    result = subprocess.run(
        [*command, *(str(part) for option in folders.items() for part in option)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return output, json.loads(result.stdout.splitlines()[-1])


def test_quick_form_fills_every_table_when_run_once(finished: tuple[Path, dict[str, object]]) -> None:
    output, report = finished
    tables = (output / "papers.md").read_text()
    for title in ("(a) Loss", "(b) Loss", "(c) Perplexity", "(c) Whole layers", "(d) What is shipped", "(e) Share"):
        assert f"## {title}" in tables
    assert "a tiny model" in tables
    assert re.search(r"\| parity \| 8 \| \d", tables)
    assert (output / "published" / "papers.md").read_text() == tables
    assert report["passed"] is True
    assert report["left_out"] == {}


def test_methods_that_keep_the_function_have_the_loss_of_the_original(
    finished: tuple[Path, dict[str, object]],
) -> None:
    found = Results(finished[0]).found("expanded-")
    base = found["original"]["domains"]
    kept = {name: values for name, values in found.items() if values["keeps_the_function"]}
    assert {"llama-pro", "interleave-zero_out", "tli-every-5-prev-zero_out", "moe-2-of-4"} <= kept.keys()
    for values in kept.values():
        for domain in DOMAINS:
            assert values["domains"][domain]["loss"] == pytest.approx(base[domain]["loss"], abs=KEPT_WITHIN)
    for name in ("interleave-copy", "moe-2-of-4-not-renormalised"):
        assert abs(found[name]["all"]["loss"] - found["original"]["all"]["loss"]) > 10 * KEPT_WITHIN


def test_training_text_holds_nothing_of_what_is_held_out(finished: tuple[Path, dict[str, object]]) -> None:
    text = finished[0] / "text"
    learned, watched = (
        [json.loads(line) for line in (text / name).read_text().splitlines()] for name in (TRAINING, HELD_OUT)
    )
    for kind in ("messages", "text"):
        mine, others = ({str(line[kind]) for line in lines if kind in line} for lines in (learned, watched))
        assert mine
        assert others
        assert not mine & others
    answers = [line["messages"][1]["content"] for line in learned if "messages" in line]
    plain = [line["text"] for line in learned if "text" in line]
    for domain in DOMAINS:
        held_out = [json.loads(line)["text"] for line in (text / domain_file(domain)).read_text().splitlines()]
        assert not [answer for answer in answers if any(answer in document for document in held_out)]
        assert not [document for document in plain if any(document[:500] in other for other in held_out)]


def test_runs_have_equal_tokens_or_equal_flops(finished: tuple[Path, dict[str, object]]) -> None:
    results = Results(finished[0])
    flops, runs = results["training-costs"]["flops"], results.found("train-")
    reference = runs["dlo"]["tokens"]
    for name, values in runs.items():
        if name.endswith("-equal-flops"):
            cost = values["tokens"] * flops[values["kind"]]
            one_step = values["tokens"] / values["steps"] * flops[values["kind"]]
            assert cost == pytest.approx(reference * flops["dlo"], abs=one_step)
        else:
            assert values["tokens"] == reference
    # Routed training runs every MLP: what it costs more than dense training is its routers.
    assert flops["deepened"] < flops["dlo"] < 1.02 * flops["deepened"]
    assert flops["llama-pro"] < flops["deepened"] < flops["moe"]


def test_thresholds_move_trained_routers_when_another_rate_is_asked_for(
    finished: tuple[Path, dict[str, object]],
) -> None:
    results = Results(finished[0])
    trained = results["train-routed-0.80-seed-0"]["all"]
    moved = results["skipping-retargeted-train-routed-0.80-seed-0-0.90"]["all"]
    assert moved["active"] > trained["active"]
    assert moved["loss"] != trained["loss"]
    as_much = results["skipping-as-much-as-train-routed-0.80-seed-0"]
    for way in ("static", "calibrated"):
        assert as_much[way]["all"]["active"] == pytest.approx(trained["active"], abs=0.02)


def test_runs_that_skip_are_compared_at_the_rate_that_was_asked_for(finished: tuple[Path, dict[str, object]]) -> None:
    results = Results(finished[0])
    compared = results.found(AS_ASKED)
    assert {"train-routed-0.90-seed-0", "train-routed-0.80-seed-0", "train-distilled-0.80"} <= compared.keys()
    apart = []
    for values in compared.values():
        for text in TEXTS:
            found = compared_as_asked(results, values, text)
            rates = {way: each["active"] for way, each in found.items()}
            assert rates == pytest.approx(dict.fromkeys(rates, values["target"]), abs=0.02)  # random ways are a sample
            assert rates["trained"] == pytest.approx(values["target"], abs=0.002)
            apart.append(len({each["perplexity"] for each in found.values()}) == len(found))
    assert any(apart)  # on so little text, two of a run's ways may skip the same
    # Right behind the run, whose weights are then of no use; those of another one are.
    file = finished[0] / "runs" / f"{AS_ASKED}train-routed-0.80-seed-0.json"
    assert file.stat().st_mtime_ns < (finished[0] / "runs" / "train-llama-pro.json").stat().st_mtime_ns
    assert results.model("train-routed-0.80-seed-0").is_dir()
    assert not results.model("train-routed-0.90-seed-0").exists()


def test_command_repeats_nothing_when_results_are_there(
    finished: tuple[Path, dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    results = Results(output)
    (lost,) = [name for name in ("kinds-train-dlo",) if name in results]
    before = {file: file.stat().st_mtime_ns for file in (output / "runs").iterdir() if file.stem != lost}
    wanted = results[lost]["skipped"]
    (output / "runs" / f"{lost}.json").unlink()
    assert main([*QUICK, "--output", str(output), "--budget-s", "20"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (output / "runs").iterdir() if file in before} == before
    assert results[lost]["skipped"] == wanted
    assert f"{lost}: " in capsys.readouterr().err


def test_command_ends_with_2_when_results_were_run_otherwise(
    finished: tuple[Path, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_llama(tmp_path / "model", vocab=300, tokenizer=True)
    assert main([*QUICK, "--output", str(finished[0]), "--model", str(model)]) == 2
    assert "holds results that were run otherwise: model is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "nowhere"], 2, "nowhere: no such file or folder"),
        (["--budget-s", "0"], 2, "--budget-s 0.0: expected more than 0"),
        (["--tasks", "docs"], 2, "docs: holds no .jsonl and no .jsonl.gz"),
        (["--held-out-tokens", "100"], 2, "--held-out-tokens 100: a window has 256"),
    ],
)
def test_command_refuses_when_arguments_are_wrong(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--quick", "--output", str(tmp_path / "out"), "--threads", "1", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pieces_are_left_out_when_the_budget_is_too_small(tmp_path: Path) -> None:
    results = Results(tmp_path)

    ended: list[bool] = []

    def piece(name: str, seconds: float, *needs: str) -> Piece:
        return Piece(name, lambda: seconds, lambda: {"value": 1}, needs, lambda: ended.append(name in results))

    stopped = Piece("stopped", lambda: 1, lambda: None)
    pieces = [piece("a", 1), piece("b", 1000), piece("c", 1, "b"), piece("d", 1, "a"), stopped]
    left_out = run_pieces(pieces, results, Budget(time.monotonic() + 100))
    assert [name for name in "abcd" if name in results] == ["a", "d"]
    assert ended == [True, True]
    assert left_out["b"].startswith("would take 1000 s")
    assert left_out["c"] == "needs b"
    assert "was stopped" in left_out["stopped"]


def test_tables_name_what_is_left_out_until_it_is_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.leave_out({"train-dlo": "would take 9 s, 1 s are left", "train-dus": "needs train-original"})
    assert "* train-dlo: would take 9 s, 1 s are left\n* train-dus: needs" in write_tables(results, "# About")
    measured = {"loss": 2.0, "perplexity": 7.389, "active": 0.83}
    run = {"kind": "dlo", "target": 0.8, "tokens": 1_000, "tokens_per_second": 10.0, "curve": [{"loss": 2.5}]}
    control = {"target": 0.7, "after": 0.73}  # of two layers in three: 1 - 0.2 of all is 1 - 0.3 of them
    domains = dict.fromkeys(DOMAINS, measured)
    results.save("train-dlo", {**run, "rate_control": control, "all": measured, "domains": domains})
    results.save("training-costs", {"flops": {"dlo": 2.0}})
    tables = write_tables(Results(tmp_path), "# About")
    assert "* train-dlo" not in tables
    assert "| dlo | 1,000 | 2 | 2e+03 | 83.0% | 82.0% | 2.5000 | 7.39 | 7.39 | 7.39 | 7.39 | 10 |" in tables
    assert (tmp_path / "papers.md").read_text() == tables


def test_results_are_refused_when_defined_otherwise(tmp_path: Path) -> None:
    Results(tmp_path).begin({"model": "x", "form": {"rates": (0.9,)}})
    Results(tmp_path).begin({"model": "x", "form": {"rates": (0.9,)}})
    with pytest.raises(InputError, match="model is 'y', was 'x'"):
        Results(tmp_path).begin({"model": "y", "form": {"rates": (0.9,)}})


def test_other_chats_take_the_place_of_the_extracted_ones(tmp_path: Path) -> None:
    chats = save_chats(tmp_path / "chats.jsonl", count=400)
    for name in (TRAINING, HELD_OUT):
        (tmp_path / name).write_text("{}\n")
    use_other_chats(tmp_path, chats)
    learned, held_out = ((tmp_path / name).read_text().splitlines() for name in (TRAINING, HELD_OUT))
    assert sorted(learned + held_out) == sorted(chats.read_text().splitlines())
    assert not set(learned) & set(held_out)
    assert 0 < len(held_out) < len(learned)
    with pytest.raises(InputError, match="too few to hold any out"):
        use_other_chats(tmp_path, save_chats(tmp_path / "few.jsonl", count=1))


SOURCE = '''
class Stack:
    def push(self, value):
        """Puts a value on top of the stack and says how many there are now."""
        # New values go to the end.
        self.values.append(value)
        return len(self.values)

    def quiet(self):
        return None


def short():
    """Too short."""
    return 1
'''


def test_function_chats_ask_for_the_source_without_its_docstring() -> None:
    (chat,) = function_chats(SOURCE)
    assert chat.question.startswith("Write the Python function push(self, value).\n\nPuts a value on top")
    assert chat.answer.splitlines() == [
        "def push(self, value):",
        "    # New values go to the end.",
        "    self.values.append(value)",
        "    return len(self.values)",
    ]
    (copy,) = function_chats(
        SOURCE.replace("        # New values go to the end.\n", "").replace("on top", "at the end")
    )
    assert copy.digest == chat.digest
    assert not list(function_chats("def broken(:"))


LONG_LINE = "a line of {} that is long enough to say whose document it is taken from"


def test_plain_documents_leave_out_what_repeats_held_out_text() -> None:
    def document(name: str, kept: int, copied: int) -> str:
        lines = [LONG_LINE.format(f"{name} {number}") for number in range(kept)]
        return "\n".join([*lines, *(LONG_LINE.format(f"held out {number}") for number in range(copied))])

    units = [Unit(f"unit {number}", (), document(str(number), 30, 10 * (number % 2))) for number in range(40)]
    found = plain_documents(units, [document("", 0, 10)], 1_000_000)
    assert found
    assert {name for name, _ in found} == {unit.name for unit in units[::2] if not unit.description_held_out}
    assert len(plain_documents(units, [], 2 * len(units[0].description))) == 2


def test_docstrings_are_those_of_the_module_and_of_what_it_defines() -> None:
    text = "Says at length what it is for and how it does it, which is more than a line or two. " * 2
    source = f'"""{text}"""\nclass Box:\n    """{text}"""\n    def get(self):\n        """Short."""\n'
    assert [name for name, _ in docstrings(source)] == ["", "Box"]
    assert not [*docstrings("class Broken")]


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT", True),
        ("License :: OSI Approved :: BSD License", True),
        ("Apache-2.0 AND MIT", True),
        ("MIT OR GPL-3.0", False),
        ("NVIDIA Proprietary", False),
        ("", False),
    ],
)
def test_licences_are_permissive_when_their_names_say_nothing_else(licence: str, permissive: bool) -> None:
    assert is_permissive(licence) is permissive


def test_units_are_held_out_by_their_name_alone() -> None:
    units = library_units()
    held_out = [unit.name for unit in units if unit.held_out]
    assert 0.05 < len(held_out) / len(units) < 0.25
    assert held_out == [unit.name for unit in units if Unit(unit.name, ()).held_out]


@pytest.fixture
def dense(tmp_path: Path) -> LlamaDloForCausalLM:
    return opened(save_tiny_llama(tmp_path / "dense", layers=4, vocab=300, tokenizer=True))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))


def _state(model: LlamaDloForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def test_upcycled_model_computes_the_same_when_weights_are_renormalised(
    dense: LlamaDloForCausalLM, tokens: torch.Tensor
) -> None:
    wanted = dense(tokens).logits
    parameters = sum(parameter.numel() for parameter in dense.model.layers[0].mlp.parameters())
    upcycle(dense, experts=4, chosen=2, renormalise=True, seed=0)
    assert torch.allclose(dense.eval()(tokens).logits, wanted, atol=1e-5)
    experts = sum(parameter.numel() for parameter in dense.model.layers[0].mlp.experts.parameters())
    assert experts == 4 * parameters


def test_balance_loss_spreads_tokens_when_one_expert_gets_them_all() -> None:
    generator = torch.Generator().manual_seed(0)
    mlp = ExpertMlp(torch.nn.Linear(8, 8), 8, experts=4, chosen=1, renormalise=True, generator=generator)
    tokens = torch.rand(1, 64, 8, generator=generator) + 0.5  # all in one orthant, so one router row may win them all
    with torch.no_grad():
        mlp.gate.weight.zero_()
        mlp.gate.weight[2] = 1.0
    mlp.train()
    (mlp(tokens) * 0).sum().backward()  # nothing but the balance loss is left
    assert mlp.gate.weight.grad is not None
    pushed = -mlp.gate.weight.grad.sum(dim=1)
    assert pushed.argmin() == 2
    assert pushed[2] < 0 < min(pushed[0], pushed[1], pushed[3])
    mlp.eval()
    mlp.zero_grad()
    (mlp(tokens) * 0).sum().backward()
    assert not mlp.gate.weight.grad.any()


@torch.no_grad()
def test_removed_layer_is_missed_no_more_when_it_added_nothing(
    dense: LlamaDloForCausalLM, tokens: torch.Tensor
) -> None:
    for projection in (dense.model.layers[2].self_attn.o_proj, dense.model.layers[2].mlp.down_proj):
        projection.weight.zero_()
    shorter = without_layers(dense, [2])
    assert shorter.config.num_hidden_layers == 3
    assert torch.allclose(shorter(tokens).logits, dense(tokens).logits, atol=1e-6)
    assert not torch.allclose(without_layers(dense, [1])(tokens).logits, dense(tokens).logits, atol=1e-3)
    removed = greedily(dense, tokens, 2)
    alone = {layer: evaluate(without_layers(dense, [layer]), tokens).perplexity for layer in range(4)}
    assert removed[0] == min(alone, key=alone.__getitem__)
    assert len(set(removed)) == 2


def test_flops_are_those_of_the_products(tmp_path: Path) -> None:
    folder = save_routed(tmp_path / "model", routed=None, layers=2, hidden=64, intermediate=128)
    data = packed(folder, save_chats(tmp_path / "chats.jsonl"))
    model = opened(folder)
    matrices = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    products = 2 * sum(value.numel() for value in matrices)
    attention = 2 * 2 * 64 * 64 * 2  # scores and values, over a window of 64, in both layers
    found = training_flops(model, data)
    # Forward once and backward twice; but nothing below the first layer wants the gradient of its input.
    assert 0.95 * 3 * (products + attention) < found <= 3 * (products + attention)
    choose_parameters(
        routed := with_routers(model, {1: np.zeros((1, 64), np.float32)}), TrainingSettings(mode="routers")
    )
    assert training_flops(routed, data) < 0.8 * found


def test_expansions_are_as_deep_as_the_papers_when_the_model_has_30_layers() -> None:
    plans = expansions(30, (3, 5, 10))
    depths = {name: plan.num_layers for name, plan in plans.items()}
    assert depths["interleave zero_out"] == depths["llama-pro"] == depths["dus, as deep"] == 36
    assert [depths[f"tli every {every}, prev copy"] for every in (3, 5, 10)] == [40, 36, 33]
    assert plans["interleave zero_out"].injected_layers == plans["tli every 5, prev zero_out"].injected_layers


class _Words:
    """A tokenizer of a few tokens."""

    TEXTS = ("def", " foo", "bar", "(", "\n", "  ", "42", " is")

    def decode(self, tokens: list[int]) -> str:
        return self.TEXTS[tokens[0]]


def test_tokens_are_told_apart_by_what_they_spell() -> None:
    kinds = token_kinds(_Words(), np.array([[0, 1, 2, 3, 4, 5, 6, 7]]))
    assert [KINDS[kind] for kind in kinds[0]] == [
        "first",
        "word",
        "rest of a word",
        "punctuation",
        "line break",
        "space",
        "number",
        "keyword",
    ]


def _plan(seconds: float, tmp_path: Path, *, routed: float = 1000.0) -> dict[str, int]:
    model = save_tiny_llama(tmp_path / "model", layers=5, vocab=300, tokenizer=True)
    with BaseModel(model) as base:
        experiment = Experiment(base, FORMS["hour"], Results(tmp_path / "results"), "cpu")
        runs = training_runs(experiment)
        flops = {run.kind: 2.0 if run.kind == "moe" else 1.0 for run in runs}
        costs = {"flops": flops, "batch": _BATCH, "tokens_per_second": {"dense": 1000.0, "routed": routed}}
        return planned_steps(runs, FORMS["hour"], costs, seconds)


_BATCH = 4
_PER_STEP = _BATCH * FORMS["hour"].sequence


def test_plan_gives_all_runs_the_tokens_that_the_main_table_has_time_for(tmp_path: Path) -> None:
    form, steps = FORMS["hour"], _plan(3_000, tmp_path)
    spent = [steps[name] * _PER_STEP * (2 if name == "train-moe" else 1) for name in [*steps][: form.main_runs]]
    assert 2_800 < sum(spent) / 1000 <= 3_000
    assert len(steps) > form.main_runs
    assert steps["train-moe-equal-flops"] == pytest.approx(steps["train-moe"] / 2, abs=1)


def test_plan_gives_fewer_tokens_when_routed_steps_are_slower(tmp_path: Path) -> None:
    form, steps = FORMS["hour"], _plan(3_000, tmp_path, routed=500.0)
    slower = ("dlo", "routed", "distilled")
    costs = [2 if name == "train-moe" or name.split("-")[1] in slower else 1 for name in [*steps][: form.main_runs]]
    spent = [steps[name] * _PER_STEP * cost for name, cost in zip(steps, costs, strict=False)]
    assert 2_800 < sum(spent) / 1000 <= 3_000


def test_plan_leaves_runs_out_when_they_would_be_too_short(tmp_path: Path) -> None:
    form, steps = FORMS["hour"], _plan(60, tmp_path)
    assert [*steps] == ["train-original", "train-deepened", "train-dlo"]
    assert min(steps.values()) * _PER_STEP >= form.least_tokens
    enough = _plan(1e9, tmp_path / "enough")
    assert enough["train-dlo"] == form.tokens // _PER_STEP


@pytest.mark.parametrize(
    ("speeds", "least_steps", "chosen"),
    [
        ({2: 100.0, 4: 190.0, 8: 195.0}, 1, 4),  # eight are hardly faster than four
        ({2: 100.0, 4: 190.0, 8: 300.0}, 1, 8),
        ({2: 100.0, 4: 190.0}, 1, 4),  # eight do not fit into memory
        ({2: 100.0, 4: 190.0, 8: 300.0}, 1_000_000, 2),
    ],
)
def test_training_takes_the_fastest_batch_that_fits_and_leaves_enough_steps(
    speeds: dict[int, float], least_steps: int, chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speed(_run: object, _experiment: object, batch: int) -> float:
        if batch not in speeds:
            raise torch.cuda.OutOfMemoryError
        return speeds[batch]

    monkeypatch.setattr(training, "tokens_per_second", speed)
    monkeypatch.setattr(training, "flops_per_token", lambda runs, _: dict.fromkeys((run.kind for run in runs), 1.0))
    form = dataclasses.replace(FORMS["hour"], batches=(2, 4, 8), least_steps=least_steps)
    with BaseModel(save_tiny_llama(tmp_path / "model", layers=5, vocab=300, tokenizer=True)) as base:
        experiment = Experiment(base, form, Results(tmp_path / "results"), "cpu")
        costs = training.training_costs(training_runs(experiment), experiment, 3_000)
    assert costs["batch"] == chosen
    assert costs["tokens_per_second"] == {"dense": speeds[chosen], "routed": speeds[chosen]}


def test_plan_stands_on_speeds_that_were_measured_before_when_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "tokens_per_second", lambda *_: pytest.fail("nothing is to be tried"))
    form = dataclasses.replace(FORMS["hour"], batches=(8, 16), runs=("train-original", "train-dlo"))
    results = Results(tmp_path / "results")
    counted = {"original": 1.0, "deepened": 1.0, "dlo": 2.0}
    (results.folder / training.FLOPS_NAME).write_text(json.dumps(counted))
    with BaseModel(save_tiny_llama(tmp_path / "model", layers=5, vocab=300, tokenizer=True)) as base:
        experiment = Experiment(base, form, results, "cpu")
        speeds = {"dense": 1000.0, "routed": 500.0}
        costs = training.training_costs(training_runs(experiment), experiment, 90, speeds)
    assert (costs["batch"], costs["tokens_per_second"], costs["flops"]) == (8, speeds, counted)
    # A token of each takes 3 ms, and a step has 4096.
    assert costs["steps"] == {"train-original": 7, "train-dlo": 7}


def test_form_takes_other_values_of_its_own_kinds_and_no_others() -> None:
    changed = with_values(FORMS["hour"], ["tokens=1000", "targets=0.9,0.7", "selection=annealed", "runs=train-dlo"])
    wanted = {"tokens": 1000, "targets": (0.9, 0.7), "selection": "annealed", "runs": ("train-dlo",)}
    assert changed == dataclasses.replace(FORMS["hour"], **wanted)
    for wrong in ("nothing=1", "tokens=many", "compile=1"):
        with pytest.raises(InputError, match=wrong):
            with_values(FORMS["hour"], [wrong])
