"""What a GPU is to show of captured decode holds on the CPU, as far as one can see it there."""

import numpy as np
import pytest
import torch

from benchmarks.gpu import pytorch_checks
from benchmarks.gpu.evidence import NO_GPU, run_part
from benchmarks.gpu.model_kernels import generate_times
from benchmarks.gpu.pytorch_times import logits_of, without_mlps
from benchmarks.gpu.random_torch_llama import TINY, random_model
from benchmarks.gpu.skip_efficiency import BAR, skip_efficiency
from benchmarks.gpu_pytorch import measure
from dlo_export.runtimes.tensorrt.gpu import find_gpu
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.step_weights import StepWeights


@pytest.mark.skipif(find_gpu().target is not None, reason="there is a GPU here: run it")
def test_part_ends_with_4_when_there_is_no_gpu(tmp_path, capsys):
    assert run_part("pytorch", None, pytorch_checks.check, measure, ["--out", str(tmp_path)]) == NO_GPU
    assert "what a CPU can check was checked" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_check_fails_when_the_decoder_is_not_the_model(monkeypatch):
    monkeypatch.setattr(pytorch_checks, "LOGITS_BAR", {"float32": 1e-9})
    with pytest.raises(RuntimeError, match="the decoder is not the model"):
        pytorch_checks.check()


@pytest.mark.parametrize(
    ("flipped", "error", "kind", "verdict"),
    [
        (0, 1e-6, "float32", True),
        (1, 1e-6, "float32", False),
        (0, 0.5, "bfloat16", False),
        (0, float("nan"), "bfloat16", False),
        (2, 0.5, "bfloat16", None),
        (50, 0.001, "bfloat16", False),
    ],
)
def test_decoder_is_judged_by_its_logits_unless_few_decisions_flipped(flipped, error, kind, verdict):
    assert pytorch_checks.judge({"flipped": flipped, "decisions": 144, "error": error}, kind) is verdict


def test_dense_and_routed_models_have_the_same_weights_when_one_has_routers():
    dense, routed = (random_model(TINY, routed=routed, device="cpu", dtype=torch.float32) for routed in (False, True))
    others = routed.state_dict()
    assert len(others) == len(dense.state_dict()) + 3
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, others[name]), name


def test_error_is_within_no_bar_when_a_number_is_missing():
    zeros, missing = torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0])
    assert pytorch_checks.largest_error(zeros, zeros) == 0
    assert not pytorch_checks.largest_error(missing, zeros) <= 1
    assert not pytorch_checks.largest_error(missing, torch.ones(3)) <= 1
    assert pytorch_checks.largest_error(zeros + 1, zeros) > 1


def test_decoder_without_mlps_is_the_model_whose_mlps_add_nothing():
    model = random_model(TINY, routed=False, device="cpu", dtype=torch.float32)
    ids = pytorch_checks.tokens_of(model, 2, 6)
    decoder = CapturedDecoder(without_mlps(StepWeights(model), 0.7), batch=2, capacity=16)
    found = logits_of(decoder, decoder.thresholds, ids)
    for layer in (1, 2):  # 0.7 of three layers, evenly spread
        model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    with torch.inference_mode():
        expected = model(input_ids=torch.cat([ids, ids[:, :3]], dim=1)).logits[:, 6:].transpose(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_skip_efficiency_is_one_by_the_ideal_that_a_step_reaches_and_less_by_stricter_ones():
    sizes = {"dense_bytes": 8e9, "unread_bytes": 3e9, "copy_rate": 4e12}
    found = skip_efficiency(4.0, 2.5, **sizes, removed_ms=2.5)
    assert (found.removed, found.proportional) == pytest.approx((1, 1))
    assert found.copied > 1  # 1.5 ms were saved of bytes that are copied in 0.75
    assert found.passed
    slower = skip_efficiency(4.0, 2.6, **sizes, removed_ms=2.4)
    assert slower.removed < slower.proportional < BAR
    assert not slower.passed
    assert skip_efficiency(4.0, 4.0, **sizes, removed_ms=2.4).removed == 0
    assert skip_efficiency(4.0, 2.5, **sizes, removed_ms=None).passed is None


def test_generate_is_timed_in_both_forms_and_thresholds_are_put_back_when_a_share_is_skipped():
    model = random_model(TINY, routed=True, device="cpu", dtype=torch.float32)
    times = generate_times(model, np.array([True, False, True]), prompt=4, tokens=2, rounds=1)
    assert set(times) == {"kernels", "plain"}
    assert times["plain"]["over_plain"] == 1
    assert model.config.router_thresholds is None


@pytest.mark.parametrize("removed_ms", [4.0, 4.1])
def test_skip_efficiency_is_unknown_with_a_reason_when_nothing_was_to_be_saved(removed_ms: float):
    sizes = {"dense_bytes": 8e9, "unread_bytes": 3e9, "copy_rate": 4e12}
    found = skip_efficiency(4.0, 3.9, **sizes, removed_ms=removed_ms)
    assert (found.removed, found.passed) == (None, None)
    assert f"of the dense step's 4 ms: removed {removed_ms:.4g} ms" in str(found.facts["efficiency_unknown"])
    assert found.proportional is not None
    assert "efficiency_unknown" not in skip_efficiency(4.0, 3.9, **sizes, removed_ms=3.0).facts
