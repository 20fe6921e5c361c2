from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlo_export.runtimes.errors import ModelLoadError, StepError
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.step_weights import StepWeights
from tests.runtimes.captured_cases import CAPACITY, LENGTHS, decoder_outputs, model_outputs, tiny_model, tokens_of
from tests.tiny_families import ROPES, save_tiny_family
from tests.tiny_models import save_tiny_llama

ROOT = Path(__file__).parents[2]


def decoder_of(model: object, *, kernels: bool = True) -> CapturedDecoder:
    return CapturedDecoder(StepWeights(model, kernels=kernels), batch=len(LENGTHS), capacity=CAPACITY)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernels", [True, False], ids=["skipping", "masked"])
@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "rescale": False}], ids=["scaled", "bias"])
def test_decoder_equals_the_model_when_prompts_differ_in_length(
    tmp_path: Path, kernels: bool, options: dict[str, bool]
) -> None:
    model = tiny_model(tmp_path / "model", **options)
    logits, scores = model_outputs(model)
    active = scores > torch.tensor([[0.5], [0.45]])
    assert active.any(0).all(1).all() or 0 < active.float().mean() < 1
    decoder = decoder_of(model, kernels=kernels)
    for _ in range(2):  # the second time in a cache that the first has filled
        got, decided = decoder_outputs(decoder)
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(decided, scores, atol=1e-6, rtol=0)


def test_decoder_equals_the_model_when_nothing_is_routed_and_mlps_have_biases(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", routed=(False,) * 3, thresholds=None, mlp_bias=True, tie=True)
    ids = tokens_of(3, CAPACITY)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, -1]
    decoder = decoder_of(model)
    decoder.prefill(ids[:, :-1])
    torch.testing.assert_close(decoder.decode(ids[:, -1]).logits, expected, atol=1e-5, rtol=0)


def test_decoder_equals_transformers_when_the_model_is_theirs(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", attention_bias=True, head_dim=12)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens_of(3, CAPACITY)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, -1]
    decoder = CapturedDecoder(StepWeights(model), batch=3, capacity=CAPACITY)
    assert decoder.prefill(ids[:, :-1]).scores == {}
    torch.testing.assert_close(decoder.decode(ids[:, -1]).logits, expected, atol=1e-5, rtol=0)


def test_decoder_computes_and_masks_when_nobody_asked_for_kernels_and_they_do_not_take_the_model(
    tmp_path: Path,
) -> None:
    model = tiny_model(tmp_path / "model", intermediate=60)
    decoder = CapturedDecoder(StepWeights(model), batch=len(LENGTHS), capacity=CAPACITY)
    torch.testing.assert_close(decoder_outputs(decoder)[0], model_outputs(model)[0], atol=1e-5, rtol=0)


def test_decoder_skips_otherwise_when_thresholds_change_between_steps(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    decoder = decoder_of(model)
    decoder.thresholds.fill_(2)
    never, _ = decoder_outputs(decoder)
    decoder.thresholds.fill_(-1)
    always, _ = decoder_outputs(decoder)
    model.config.router_thresholds = {"0": 0.0, "2": 0.0}
    torch.testing.assert_close(always, model_outputs(model)[0], atol=1e-5, rtol=0)
    model.config.router_thresholds = {"0": 1.0, "2": 1.0}
    torch.testing.assert_close(never, model_outputs(model)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernels", [True, False])
def test_decoder_equals_the_model_when_prompts_rows_are_gathered(tmp_path: Path, kernels: bool) -> None:
    model = tiny_model(tmp_path / "model")
    weights = StepWeights(model, kernels=kernels)
    decoder = CapturedDecoder(weights, batch=len(LENGTHS), capacity=CAPACITY, gather_prompts=True)
    torch.testing.assert_close(decoder_outputs(decoder)[0], model_outputs(model)[0], atol=1e-5, rtol=0)


def test_decoder_decodes_anew_when_its_cache_was_cropped(tmp_path: Path) -> None:
    decoder = decoder_of(tiny_model(tmp_path / "model"))
    ids = tokens_of(3, 9)
    decoder.prefill(ids[:, :6], [6, 4, 5])
    expected = decoder.decode(ids[:, 6]).logits
    decoder.decode(ids[:, 7])
    decoder.crop([6, 4, 5])
    torch.testing.assert_close(decoder.decode(ids[:, 6]).logits, expected, atol=0, rtol=0)
    with pytest.raises(StepError, match=r"got lengths \[8, 4, 5\]"):
        decoder.crop([8, 4, 5])


def test_others_decode_on_when_a_full_sequence_that_has_ended_is_cropped(tmp_path: Path) -> None:
    decoder, ids = decoder_of(tiny_model(tmp_path / "model")), tokens_of(3, CAPACITY)
    lengths = [CAPACITY - 2, 4, 5]
    decoder.prefill(ids, lengths)
    expected = [decoder.decode(ids[:, step]).logits[1:].clone() for step in range(2)]
    with pytest.raises(StepError, match="a sequence that has ended, crop to fewer tokens"):
        decoder.decode(ids[:, 2])
    decoder.prefill(ids, [CAPACITY, 4, 5])
    for step in range(2):
        decoder.crop([1, 4 + step, 5 + step])
        torch.testing.assert_close(decoder.decode(ids[:, step]).logits[1:], expected[step], atol=1e-6, rtol=0)


def test_decoder_goes_on_where_it_was_when_a_step_fails(tmp_path: Path) -> None:
    decoder = decoder_of(tiny_model(tmp_path / "model"))
    decoder.prefill(tokens_of(3, 6))
    with pytest.raises(RuntimeError, match="must match"):
        decoder.decode(tokens_of(2, 1)[:, 0])  # two tokens for three sequences
    with pytest.raises(StepError, match=r"at most \[6, 6, 6\]"):
        decoder.crop([7, 7, 7])


@pytest.mark.parametrize("kernels", [True, False])
def test_model_computes_the_same_when_a_decoder_shares_its_weights_and_when_it_was_released(
    tmp_path: Path, kernels: bool
) -> None:
    model = tiny_model(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, _ = model_outputs(model)
    weights = StepWeights(model, kernels=kernels)
    torch.testing.assert_close(model_outputs(model)[0], expected, atol=1e-5, rtol=0)
    weights.release()
    for name, tensor in model.state_dict().items():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_kernels_equal_the_model_when_interpreted(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("interpreted_decoder.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 5
    for name, (logits, scores) in found.items():
        assert logits <= 2e-5, name
        assert scores <= 1e-6, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "llama_dlo"}, r"skip whole layers[\s\S]*TorchRunner"),
        ({"intermediate": 60}, r"intermediate 60; expected a multiple of 8[\s\S]*kernels=False"),
        ({"mlp_bias": True}, r"mlp_bias true[\s\S]*kernels=False"),
    ],
)
def test_weights_are_refused_when_the_kernels_cannot_take_the_model(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        StepWeights(tiny_model(tmp_path / "model", **options), kernels=True)


def test_weights_are_refused_when_layers_are_not_a_llamas(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    model.config.hidden_act = "gelu"
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ModelLoadError, match="this model has Identity, gelu"):
        StepWeights(model, kernels=False)


@pytest.mark.parametrize(("model_type", "rope", "found"), [("llama", "dynamic", "rope"), ("qwen3", None, "Qwen3")])
def test_weights_are_refused_by_name_when_the_family_or_its_rope_is_another(
    tmp_path: Path, model_type: str, rope: str | None, found: str
) -> None:
    model = save_tiny_family(tmp_path / "model", model_type, **(ROPES[rope] if rope else {}))
    with pytest.raises(ModelLoadError, match=f"this model has {found}"):
        StepWeights(model)


def test_decoder_refuses_a_step_when_it_does_not_fit(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    for options in ({"prompt": 5}, {"prompt": 2, "gather_prompts": True}):
        with pytest.raises(StepError, match=r"prompts of \d tokens to capture, expected 4"):
            CapturedDecoder(StepWeights(model), batch=1, capacity=4, **options)  # type: ignore[arg-type]
    decoder = decoder_of(model)
    ids = tokens_of(3, CAPACITY + 1)
    with pytest.raises(StepError, match="before prefill"):
        decoder.decode(ids[:, 0])
    with pytest.raises(StepError, match="got 2 prompts and 2 lengths, expected 3"):
        decoder.prefill(ids[:2, :4])
    with pytest.raises(StepError, match=f"expected 1 to {CAPACITY}"):
        decoder.prefill(ids)
    with pytest.raises(StepError, match="0 to 4 tokens"):
        decoder.prefill(ids[:, :4], [4, 0, 4])
    decoder.prefill(ids[:, :CAPACITY])
    with pytest.raises(StepError, match=f"all {CAPACITY} slots"):
        decoder.decode(ids[:, 0])
