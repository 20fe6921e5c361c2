from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from dlo_export.runtimes.errors import ModelLoadError, StepError
from dlo_export.runtimes.torch.reference import open_reference
from dlo_export.runtimes.torch.runner import TorchRunner
from tests.runtimes.authors_model import AUTHORS, WHOLE_LAYERS, config_of, tensors_of
from tests.runtimes.feeding import feed, joined_logits, joined_scores, reference_samples
from tests.tiny_models import save_tiny_llama


def _runner(kind: str, folder: Path = AUTHORS) -> TorchRunner:
    if kind in ("masked", "gathered"):
        return TorchRunner.from_folder(folder, masked=kind == "masked")
    return open_reference(config_of(folder), tensors_of(folder), stream=kind == "streamed")


@pytest.mark.parametrize("kind", ["masked", "gathered", "resident", "streamed"])
@pytest.mark.parametrize("folder", [AUTHORS, WHOLE_LAYERS], ids=["mlp", "layer"])
def test_runner_matches_the_authors_when_fed_their_samples(folder: Path, kind: str) -> None:
    expected, routed = np.load(folder / "expected.npz"), np.flatnonzero(config_of(folder)["is_dlo"])
    samples = reference_samples(expected)
    with _runner(kind, folder) as runner:
        assert (runner.num_layers, runner.routed_layers) == (4, tuple(routed))
        for cached in (0, 3):
            results, _ = feed(runner, samples, cached)
            logits, scores = joined_logits(results), joined_scores(results)
            for row, sample in enumerate(samples):
                length = sample.shape[1]
                np.testing.assert_allclose(logits[row, -length:], expected[f"logits_{row}"][0], atol=1e-4, rtol=0)
                active = np.stack([scores[layer][row, -length:] > 0.5 for layer in routed])
                np.testing.assert_array_equal(active, expected[f"active_{row}"][:, 0])


def test_runner_matches_transformers_when_the_model_is_dense(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", tie=True, rope="llama3", attention_bias=True)
    ids = np.random.default_rng(0).integers(0, 97, (1, 12))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder)
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    tensors = tensors_of(folder)
    for runner in (
        TorchRunner.from_folder(folder),
        open_reference(config_of(folder), tensors, stream=False),
        open_reference(config_of(folder), tensors, stream=True),
    ):
        with runner:
            assert runner.routed_layers == ()
            np.testing.assert_allclose(joined_logits(feed(runner, [ids], 4)[0]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("folder", [AUTHORS, WHOLE_LAYERS], ids=["mlp", "layer"])
def test_runner_obeys_decisions_when_they_are_forced(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    samples = reference_samples(expected)[:1]
    routed = np.flatnonzero(config_of(folder)["is_dlo"])
    others = {int(layer): ~expected["active_0"][i] for i, layer in enumerate(routed)}
    with _runner("masked", folder) as masked, _runner("gathered", folder) as gathered:
        wanted = joined_logits(feed(masked, samples, 2, force=others)[0])
        got = joined_logits(feed(gathered, samples, 2, force=others)[0])
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    assert np.abs(wanted - expected["logits_0"]).max() > 1e-2


def test_runner_returns_every_layers_stream_when_hidden_states_are_asked_for(expected: np.lib.npyio.NpzFile) -> None:
    with _runner("masked") as runner:
        (result,), _ = feed(runner, reference_samples(expected)[:1], hidden_states=True)
        (without,), _ = feed(runner, reference_samples(expected)[:1])
    assert sorted(result.hidden_states) == [0, 1, 2, 3]
    assert result.hidden_states[3].shape == (1, 17, 48)
    assert without.hidden_states == {}
    tensors = load_file(AUTHORS / "model.safetensors")
    stream = result.hidden_states[3]
    normed = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-5) * tensors["model.norm.weight"]
    np.testing.assert_allclose(normed @ tensors["lm_head.weight"].T, result.logits, atol=1e-4, rtol=0)


def test_runner_computes_one_row_of_logits_when_last_logits_are_asked_for(expected: np.lib.npyio.NpzFile) -> None:
    with _runner("gathered") as runner:
        (result,), _ = feed(runner, reference_samples(expected)[:1], last_logits=True)
    np.testing.assert_allclose(result.logits[:, 0], expected["logits_0"][:, -1], atol=1e-4, rtol=0)


def test_runner_raises_when_there_is_no_checkpoint_or_it_was_closed(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        TorchRunner.from_folder(tmp_path)
    (tmp_path / "config.json").write_text((AUTHORS / "config.json").read_text())
    with pytest.raises(ModelLoadError, match="transformers"):
        TorchRunner.from_folder(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no dtype int4[\s\S]*fp32, fp16, bf16"):
        TorchRunner.from_folder(AUTHORS, dtype="int4")
    ones = np.ones((1, 1), np.int64)
    with _runner("resident") as runner, pytest.raises(StepError, match="before reset"):
        runner.step(ones, ones, ones)
    with pytest.raises(StepError, match="closed"):
        runner.step(ones, ones, ones)
