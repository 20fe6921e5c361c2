"""What a GPU is to show of captured decode holds on the CPU, as far as one can see it there."""

import pytest
import torch

from benchmarks.gpu import pytorch_checks
from benchmarks.gpu.evidence import NO_GPU, run_part
from benchmarks.gpu.random_torch_llama import TINY, random_model
from benchmarks.gpu_pytorch import measure
from dlo_export.runtimes.tensorrt.gpu import find_gpu


@pytest.mark.skipif(find_gpu().target is not None, reason="there is a GPU here: run it")
def test_part_ends_with_4_when_there_is_no_gpu(tmp_path, capsys):
    assert run_part("pytorch", None, pytorch_checks.check, measure, ["--out", str(tmp_path)]) == NO_GPU
    assert "what a CPU can check was checked" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_check_fails_when_the_decoder_is_not_the_model(monkeypatch):
    monkeypatch.setattr(pytorch_checks, "LOGITS_BAR", {"float32": 1e-9})
    with pytest.raises(RuntimeError, match="the decoder is not the model"):
        pytorch_checks.check()


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
