import pytest

from dlo_export.checkpoints.device_options import DeviceOption, parse_device
from dlo_export.checkpoints.errors import InputError


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", DeviceOption("cpu")), ("cuda", DeviceOption("cuda")), ("cuda:17", DeviceOption("cuda", 17))],
)
def test_device_is_read_and_shown_again_when_it_is_one(text, device):
    assert parse_device(text) == device
    assert str(device) == text


@pytest.mark.parametrize(
    "text", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:01", "cuda:x", "cpu:0", "cuda:0\n", "mps"]
)
def test_device_is_refused_when_it_is_none(text):
    with pytest.raises(InputError, match=r"is no device, expected cpu\|cuda\[:N\][\s\S]*hint:"):
        parse_device(text)
