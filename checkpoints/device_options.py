"""The words of `--device` and `--provider`, read without loading what computes on them, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from dlo_export.checkpoints.errors import InputError

ProviderOption = Literal["cpu", "cuda"]
"""ONNX Runtime's execution providers, as `--provider` calls them."""

DEVICE_FORM = "cpu|cuda[:N]"


@dataclasses.dataclass(frozen=True)
class DeviceOption:
    """Where PyTorch is to compute. `modeling.devices.torch_device` says whether it can.

    Attributes:
        kind: "cpu" or "cuda".
        index: Of the GPU among the visible ones; None for the process's own: the first, or with several processes the
            one that each was started for.
    """

    kind: Literal["cpu", "cuda"]
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def parse_device(text: str) -> DeviceOption:
    """Reads `cpu`, `cuda` or `cuda:1`.

    Raises:
        InputError: It is none of these.
    """
    if text == "cpu":
        return DeviceOption("cpu")
    if (match := re.fullmatch(r"cuda(?::(0|[1-9]\d{0,3}))?", text)) is None:
        raise InputError(
            f"--device {text}: is no device, expected {DEVICE_FORM}",
            hint="cuda is the first visible GPU, cuda:1 the second",
        )
    return DeviceOption("cuda", None if match[1] is None else int(match[1]))
