"""What is said where there is no GPU; what a GPU does with it, benchmarks/gpu_check.py shows."""

import pytest

from dlo_export.runtimes.errors import BackendUnavailableError
from dlo_export.runtimes.tensorrt.device import Device


def test_device_says_what_is_missing_when_there_is_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the same on a machine that has one
    with pytest.raises(BackendUnavailableError, match="TensorRT: ") as raised:
        Device()
    assert raised.value.exit_code == 4
    assert "GPU" in str(raised.value) or "cuda-bindings" in str(raised.value)
