"""Devices of PyTorch: what `--device` asks for, or why it cannot be had."""

from __future__ import annotations

import torch

from dlo_export.checkpoints.device_options import parse_device
from dlo_export.checkpoints.errors import MachineError

_NEEDED = "--device cuda needs an NVIDIA GPU with its driver and a CUDA build of PyTorch; --device cpu needs neither"


def torch_device(option: str) -> torch.device:
    """The device of that name. Nothing else takes its place.

    Args:
        option: "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: It is no such name.
        MachineError: PyTorch has no CUDA, CUDA does not start here, or there is no GPU of that number.
    """
    device = parse_device(option)
    if device.kind == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise MachineError(
            f"--device {option}: PyTorch finds no CUDA device, since this PyTorch {torch.__version__} has no CUDA",
            hint=_NEEDED,
        )
    if not torch.cuda.is_available():
        raise MachineError(
            f"--device {option}: PyTorch finds no CUDA device: no GPU is visible, or its driver is older than CUDA "
            f"{torch.version.cuda}",
            hint=_NEEDED,
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise MachineError(
            f"--device {option}: PyTorch finds {count} CUDA device{'s' if count > 1 else ''}",
            hint=f"they are called cuda:0 to cuda:{count - 1}" if count > 1 else "it is called cuda",
        )
    return torch.device(str(device))
