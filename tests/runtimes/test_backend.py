"""What is known of the two TensorRTs before either is loaded."""

import dataclasses

import pytest

from dlo_export.checkpoints.errors import MachineError
from dlo_export.runtimes.tensorrt.backend import BACKENDS


def test_installed_backend_tells_its_version():
    rtx = BACKENDS["rtx"]
    assert rtx.is_installed()
    assert rtx.version() == rtx.load().__version__


def test_how_to_install_is_said_when_a_backend_is_missing():
    missing = dataclasses.replace(BACKENDS["tensorrt"], module="tensorrt_that_is_missing", distributions=("no-such",))
    assert not missing.is_installed()
    with pytest.raises(MachineError, match="is not installed") as raised:
        missing.version()
    assert "pip install 'dlo-export[tensorrt]'" in str(raised.value)


def test_noise_is_told_from_errors():
    assert BACKENDS["rtx"].is_noise("[ERROR] cudaError 35: driver version is insufficient")
    assert not BACKENDS["tensorrt"].is_noise("[ERROR] cudaError 35: driver version is insufficient")
    assert not BACKENDS["rtx"].is_noise("[ERROR] no implementation for node /down")
