"""Active rates moved by thresholds: of a model, by `dlo calibrate --retarget`, and in the end of a training run."""

from __future__ import annotations

import dataclasses
import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from dlo_export.checkpoints.adapter.adapter import load_adapter
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.modeling.calibration.evaluation import evaluate, with_routers
from dlo_export.modeling.calibration.rate_control import sequence_scores, shift_thresholds, use_thresholds
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings, calibrate_routers
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.packing import PackedSets
from dlo_export.modeling.training.router_distillation import DistillationSettings, distilled_routers
from tests.exporter.forked_commands import Ended, run
from tests.modeling.training_runs import (
    SETTINGS,
    opened,
    packed,
    run_rank_whose_scores_are_off,
    save_chats,
    save_routed,
    start_ranks,
)
from tests.modeling.training_runs import run as train
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

LAYERS = 4


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, BYTE_VOCABULARY, (24, 64)))


@pytest.fixture
def model(tmp_path: Path) -> LlamaDloForCausalLM:
    return opened(save_tiny_llama(tmp_path / "model", layers=LAYERS, vocab=BYTE_VOCABULARY, routed=[True] * LAYERS))


def mean_rate(model: LlamaDloForCausalLM, sequences: torch.Tensor) -> float:
    return float(np.mean([*evaluate(model, sequences).active_rates.values()]))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8, 0.95])
def test_rate_is_what_was_asked_on_this_text_and_on_other(
    model: LlamaDloForCausalLM, sequences: torch.Tensor, rate: float
) -> None:
    fitted, others = sequences[:12], sequences[12:]
    found = shift_thresholds(model, lambda: sequence_scores(model, fitted), rate)
    assert mean_rate(model, fitted) == pytest.approx(rate, abs=0.0015)
    assert found.after == pytest.approx(mean_rate(model, fitted), abs=1e-6)
    assert mean_rate(model, others) == pytest.approx(rate, abs=0.03)
    # One shift for all layers: what they differ in is what their scores differ in.
    assert len(set(found.thresholds.values())) == 1
    assert 0.3 < found.before < 0.7


def test_thresholds_keep_their_distances_when_shifted(model: LlamaDloForCausalLM, sequences: torch.Tensor) -> None:
    use_thresholds(model, {0: 0.25, 2: 0.75})
    shift_thresholds(model, lambda: sequence_scores(model, sequences), 0.8, layers=(0, 2, 3))
    logits = {layer: np.log(t / (1 - t)) for layer in range(LAYERS) if (t := model.config.threshold(layer)) != 0.5}
    assert set(logits) == {0, 2, 3}  # layer 1 was not to be shifted
    assert logits[2] - logits[0] == pytest.approx(2 * np.log(3), abs=1e-4)
    assert logits[3] - logits[0] == pytest.approx(np.log(3), abs=1e-4)


def test_nearest_rate_is_told_when_scores_are_all_the_same(model: LlamaDloForCausalLM, sequences: torch.Tensor) -> None:
    for layer in range(LAYERS):
        torch.nn.init.zeros_(model.model.router(layer).weight)
    found = shift_thresholds(model, lambda: sequence_scores(model, sequences), 0.8)
    assert (found.before, found.after) == (0.0, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_rate_is_what_was_asked_when_skipping_in_one_layer_decides_for_those_behind(
    sequences: torch.Tensor, tmp_path: Path, rate: float
) -> None:
    """Each router reads what the layers before it add: there is none of that where they are skipped."""
    folder = save_tiny_llama(
        tmp_path / "model", layers=6, vocab=BYTE_VOCABULARY, routed=[True] * 6, model_type="llama_dlo", rescale=False
    )
    model, text = opened(folder), sequences[:12]
    use_thresholds(model, dict.fromkeys(range(6), 1e-9))  # so that nothing is skipped
    model.model.router(0).weight.mul_(0.02)
    for layer in range(1, 6):
        streams = model(text, use_cache=False, output_hidden_states=True).hidden_states
        added = streams[layer] - streams[0]
        mean = added.mean((0, 1))
        model.model.router(layer).weight.copy_(mean[None] / (added @ mean).mean())
    use_thresholds(model, {})
    assert shift_thresholds(model, lambda: sequence_scores(model, text), rate).after == pytest.approx(rate, abs=0.005)


def test_everything_is_active_when_all_is_asked_for(model: LlamaDloForCausalLM, sequences: torch.Tensor) -> None:
    assert shift_thresholds(model, lambda: sequence_scores(model, sequences), 1.0).after == 1.0


# `dlo calibrate --retarget`


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed checkpoint, a plain one, routers for it, and texts."""
    folder = tmp_path_factory.mktemp("place")
    options: dict[str, Any] = {"layers": 6, "vocab": BYTE_VOCABULARY, "tokenizer": True}
    save_tiny_llama(folder / "routed", routed=[True] * 5 + [False], scale_gap=0.7, **options)
    save_tiny_llama(folder / "plain", **options)
    (folder / "texts").mkdir()
    chooser = random.Random(0)
    words = ["".join(chooser.choices(string.ascii_letters, k=chooser.randint(1, 9))) for _ in range(300)]
    for position in range(16):
        (folder / "texts" / f"{position}.txt").write_text(" ".join(chooser.choices(words, k=800)))
    made = calibrate(folder, "plain", folder / "routers", "--as-adapter", "--target", 0.85, "--tokens", 2048)
    assert made.returncode == 0, made.stderr
    return folder


def calibrate(place: Path, model: str, output: Path, *options: object) -> Ended:
    common = ("--text", place / "texts", "--evaluation-tokens", 2048, "--json")
    return run("calibrate", place / model, "-o", output, *common, *options)


def test_retarget_moves_a_checkpoints_rate_and_nothing_else(place: Path, tmp_path: Path) -> None:
    result = calibrate(place, "routed", tmp_path / "out", "--retarget", 0.8, "--tokens", 8192)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["active_rate"]["original"] == pytest.approx(0.8, abs=0.02)
    assert report["rate_control"]["target"] == 0.8
    assert report["rate_control"]["after"] == pytest.approx(report["active_rate"]["original"])
    assert report["rate_control"]["before"] < 0.75
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["router_thresholds"] == report["router_thresholds"]
    assert config["model_type"] == "llama_dlo_exattn_thresholds"
    assert (config["rescale_hidden_states"], config["scale_gap"]) == (True, 0.7)
    with open_checkpoint(place / "routed") as before, open_checkpoint(tmp_path / "out") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            np.testing.assert_array_equal(after.tensors[name].numpy(), tensor.numpy())
    # Again, from thresholds to others; then fitted anew, which has none.
    again = calibrate(place, tmp_path / "out", tmp_path / "again", "--retarget", 0.9)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["active_rate"]["original"] == pytest.approx(0.9, abs=0.02)
    anew = calibrate(place, tmp_path / "out", tmp_path / "anew", "--tokens", 2048)
    assert anew.returncode == 0, anew.stderr
    config = json.loads((tmp_path / "anew" / "config.json").read_text())
    assert (config["model_type"], config["router_thresholds"]) == ("llama_dlo_exattn", None)
    exported = run("export", tmp_path / "again", "-o", tmp_path / "artefact")
    assert exported.returncode == 0, exported.stderr


def test_retarget_moves_an_adapters_rate_and_nothing_else(place: Path, tmp_path: Path) -> None:
    options = ("--adapter", place / "routers", "--retarget", 0.7, "--tokens", 8192)
    result = calibrate(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["active_rate"]["original"] == pytest.approx(0.7, abs=0.02)
    before, after = load_adapter(place / "routers"), load_adapter(tmp_path / "out")
    assert dataclasses.replace(after, tensors={}) == dataclasses.replace(
        before, tensors={}, router_thresholds=after.router_thresholds
    )
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name].numpy(), tensor.numpy())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("plain", ("--retarget", 0.8), "has no routers whose rate could be moved"),
        ("routed", ("--retarget", 0), "--retarget is 0.0, expected a share between 0 and 1"),
        ("routed", ("--retarget", 1), "--retarget is 1.0, expected a share between 0 and 1"),
        ("routed", ("--retarget", 0.1), "10% active would skip 5.4 layers' MLPs, but 5 layers have routers"),
        ("routed", ("--retarget", 0.8, "--as-adapter"), "has its routers in the checkpoint"),
        ("routed", ("--retarget", 0.8, "--target", 0.8, "--labels", "cos"), "leave out --target, --labels"),
        ("plain", ("--objective", "distill", "--steps", 0), "--steps"),
        ("plain", ("--objective", "distill", "--router-learning-rate", 0), "0.0 is not more than 0"),
    ],
)
def test_calibrate_refuses_what_cannot_work(
    place: Path, tmp_path: Path, model: str, options: tuple[object, ...], message: str
) -> None:
    result = calibrate(place, model, tmp_path / "out", *options)
    shown = " ".join(result.stderr.replace("│", " ").split())
    assert (result.returncode, message in shown) == (2, True), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_retarget_says_so_when_routers_have_nothing_to_choose_by(place: Path, tmp_path: Path) -> None:
    made = run("expand", place / "plain", "-o", tmp_path / "zero", "--every", 6, "--routers")
    assert made.returncode == 0, made.stderr
    result = calibrate(place, tmp_path / "zero", tmp_path / "out", "--retarget", 0.8)
    assert result.returncode == 2, result.stderr
    assert "too many scores are the same" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


# `dlo calibrate --objective distill`


@torch.no_grad()
def divergence(model: LlamaDloForCausalLM, sequences: torch.Tensor) -> float:
    """Of the dense model's next tokens from the routed one's, mean per token."""
    wanted = F.log_softmax(with_routers(model, {})(sequences).logits, dim=-1)
    found = F.log_softmax(model(sequences).logits, dim=-1)
    return float(F.kl_div(found, wanted, reduction="sum", log_target=True)) / sequences.numel()


def test_distilled_routers_diverge_less_than_similar_ones_at_the_same_rate(tmp_path: Path) -> None:
    dense = opened(save_tiny_llama(tmp_path / "model", layers=6, vocab=BYTE_VOCABULARY))
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sequences = torch.randint(0, BYTE_VOCABULARY, (400, 64), generator=torch.Generator().manual_seed(0))
    others, text = sequences[:40], sequences[40:]
    similar = calibrate_routers(dense, text[:128], CalibrationSettings(target_active=0.8))
    start, rate = {layer: similar.routers[layer] for layer in similar.choosing}, similar.rate_of_choosing(0.8)
    distilled = distilled_routers(dense, start, text, rate, DistillationSettings(batch=16), held_out=others[:2])
    found = []
    for routers in (start, distilled):
        routed = with_routers(dense, routers)
        shift_thresholds(routed, lambda routed=routed: sequence_scores(routed, text[:64]), rate)
        assert mean_rate(routed, others) == pytest.approx(rate, abs=0.02)
        found.append(divergence(routed, others))
    assert found[1] < 0.85 * found[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_distilled_routers_have_the_rate_that_was_asked_for(place: Path, tmp_path: Path) -> None:
    options = ("--objective", "distill", "--target", 0.8, "--steps", 6, "--tokens", 8192)
    result = calibrate(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    # A model of random weights, and 2,048 tokens of other documents than thresholds are fitted on.
    assert report["active_rate"]["original"] == pytest.approx(0.8, abs=0.03)
    assert report["rate_control"]["target"] == 0.8
    similar = calibrate(place, "plain", tmp_path / "similar", "--target", 0.8, "--tokens", 8192)
    assert similar.returncode == 0, similar.stderr
    with open_checkpoint(tmp_path / "out") as distilled, open_checkpoint(tmp_path / "similar") as fitted:
        assert distilled.tensors.keys() == fitted.tensors.keys()
        differing = {
            name
            for name, tensor in fitted.tensors.items()
            if not np.array_equal(tensor.numpy(), distilled.tensors[name].numpy())
        }
    assert differing == {name for name in differing if name.startswith("model.routers.")} != set()


def test_distilled_routers_go_on_an_adapters_layers_and_leave_its_identities_skipping(
    place: Path, tmp_path: Path
) -> None:
    options = ("-o", tmp_path / "tli", "--every", 3, "--adapter")
    made = run("expand", place / "plain", *options)
    assert made.returncode == 0, made.stderr
    options = ("--adapter", tmp_path / "tli", "--objective", "distill", "--target", 0.8, "--steps", 1, "--tokens", 4096)
    result = calibrate(place, "plain", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["injected_layers"], report["identity_layers"]) == ([3, 7], [3, 7])
    assert report["active_rate"]["injected"] == 0.0
    assert report["active_rate"]["original"] == pytest.approx(0.8, abs=0.03)
    adapter = load_adapter(tmp_path / "out")
    assert not {3, 7} & adapter.router_thresholds.keys()
    assert not any(adapter.router(layer).any() for layer in (3, 7))


# In the end of a training run


@pytest.mark.parametrize("exact", [True, False])
def test_trained_rate_is_the_target_when_asked_for(tmp_path: Path, exact: bool) -> None:
    folder, chats = save_routed(tmp_path / "model"), save_chats(tmp_path / "chats.jsonl", 160)
    data = PackedSets(training=packed(folder, chats), held_out=packed(folder, chats))
    model = opened(folder)
    settings = dataclasses.replace(SETTINGS, target=0.9, anneal_steps=0, max_steps=2, rate_weight=0.0, exact_rate=exact)
    result = train(model, data, tmp_path / "run", settings)
    assert result.held_out is not None
    if not exact:
        assert result.rate_control is None
        assert model.config.thresholds == {}
        assert abs(result.held_out.active_rate - 0.9) > 0.05
        return
    control = result.rate_control
    assert control is not None
    assert (control.target, control.other_text) == (0.9, True)
    assert abs(control.before - 0.9) > 0.05
    assert control.after == pytest.approx(0.9, abs=0.02)
    assert result.held_out.active_rate == pytest.approx(0.9, abs=0.02)
    assert control.thresholds == model.config.thresholds
    assert set(control.thresholds) == {0, 2}


@pytest.mark.parametrize("off", [2.0**-24, 0.2], ids=["the last bit", "so far that it would shift elsewhere"])
def test_processes_shift_thresholds_together_when_their_scores_differ(tmp_path: Path, off: float) -> None:
    """One that shifted otherwise, or measured once more, would part from the others, or wait for them for ever."""
    folder, chats = save_routed(tmp_path / "model"), save_chats(tmp_path / "chats.jsonl")
    ranks = start_ranks(run_rank_whose_scores_are_off, folder, chats, tmp_path / "run", off)
    for rank in ranks:
        rank.join(timeout=120)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert abs(first["before"] - 0.9) > 0.05
    assert first["after"] == pytest.approx(0.9, abs=0.05)
    assert first["of_the_model"]


def test_thresholds_stay_when_training_came_near_enough(tmp_path: Path) -> None:
    folder, chats = save_routed(tmp_path / "model"), save_chats(tmp_path / "chats.jsonl", 160)
    data = PackedSets(training=packed(folder, chats), held_out=packed(folder, chats))
    settings = dataclasses.replace(SETTINGS, max_steps=1, learning_rate=1e-12, router_learning_rate=1e-12)
    first = train(opened(folder), data, tmp_path / "first", settings)
    assert first.rate_control is not None
    settings = dataclasses.replace(settings, target=round(first.rate_control.before, 3))
    second = train(opened(folder), data, tmp_path / "second", settings)
    assert second.rate_control is not None
    assert second.rate_control.before == pytest.approx(settings.target, abs=0.01)
    assert second.rate_control.after == second.rate_control.before
    assert second.rate_control.thresholds == {}


def test_rate_of_whole_layers_is_moved_and_comes_back_from_the_file(sequences: torch.Tensor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": LAYERS, "vocab": BYTE_VOCABULARY, "routed": [True] * LAYERS}
    model = opened(save_tiny_llama(tmp_path / "model", model_type="llama_dlo", **options))
    found = shift_thresholds(model, lambda: sequence_scores(model, sequences), 0.8)
    assert mean_rate(model, sequences) == pytest.approx(0.8, abs=0.0015)
    again = save_tiny_llama(tmp_path / "again", model_type="llama_dlo", thresholds=found.thresholds, **options)
    reopened = AutoModelForCausalLM.from_pretrained(again)
    assert reopened.config.model_type == "llama_dlo_thresholds"
    assert mean_rate(reopened, sequences) == pytest.approx(mean_rate(model, sequences), abs=1e-4)
