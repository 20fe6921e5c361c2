"""Which GPU this machine has, asked of the driver library alone (CUDA driver API: cuInit, cuDeviceGetAttribute)."""

from __future__ import annotations

import ctypes
import dataclasses

_DRIVER = "libcuda.so.1"
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the driver said.

    Attributes:
        target: Of the first visible GPU, such as "sm89"; None where there is none.
        reason: Why there is none; empty otherwise.
    """

    target: str | None
    reason: str = ""


def find_gpu() -> Gpu:
    """The first visible GPU. Without a GPU this runs up to the driver's first answer; beyond, it is unverified."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as err:
        return Gpu(None, f"the NVIDIA driver is missing: {err}")
    count = ctypes.c_int()
    for name, arguments in (("cuInit", (0,)), ("cuDeviceGetCount", (ctypes.byref(count),))):
        if status := getattr(driver, name)(*arguments):
            return Gpu(None, f"the NVIDIA driver answers {name} with CUresult {status}")
    if not count.value:
        return Gpu(None, "the NVIDIA driver finds 0 GPUs")
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value, device = ctypes.c_int(), 0
        if status := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return Gpu(None, f"the NVIDIA driver answers cuDeviceGetAttribute with CUresult {status}")
        capability.append(str(value.value))
    return Gpu(f"sm{''.join(capability)}")
