import re

import pytest
import torch

from dlo_export.checkpoints.errors import MachineError
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.settings import TrainingSettings


def test_device_is_pytorchs_when_it_is_there():
    assert torch_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("option", ["cuda", "cuda:1"])
def test_device_is_the_machines_fault_when_pytorch_finds_none(option):
    with pytest.raises(MachineError, match=rf"--device {option}: PyTorch finds no CUDA device") as refused:
        torch_device(option)
    assert refused.value.exit_code == 4
    assert "driver" in (refused.value.hint or "")


def test_training_is_refused_when_it_is_to_choose_among_gpus():
    assert TrainingSettings(device="cuda:0").device == "cuda:0"
    with pytest.raises(TrainingError, match=re.escape("device is 'cuda:1'") + ".*CUDA_VISIBLE_DEVICES"):
        TrainingSettings(device="cuda:1")
