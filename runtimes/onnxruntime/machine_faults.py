"""ONNX Runtime's errors that are the machine's, told from the model's by what they say."""

from __future__ import annotations

import re

from dlo_export.runtimes.errors import BackendUnavailableError

# What its arenas, allocators and CUDA itself say; and what a driver or GPU says that its kernels were not built for.
_OUT_OF_MEMORY = re.compile(r"Failed to allocate memory|out of memory|bad_alloc|bad allocation", re.IGNORECASE)
_CUDA = re.compile(r"(CUDA|CUBLAS|CUDNN|CURAND) (failure|error) \d+[^;]*", re.IGNORECASE)


def check_machine(name: str, error: Exception) -> None:
    """Raises what an error of ONNX Runtime means, if it is the machine's.

    Args:
        name: Of the model.
        error: As ONNX Runtime raised it.

    Raises:
        BackendUnavailableError: Memory is full, or CUDA failed.
    """
    said = str(error)
    if _OUT_OF_MEMORY.search(said):
        raise BackendUnavailableError(
            f"{name}: ONNX Runtime found no memory left: {_first_line(said)}",
            hint="feed a smaller batch or shorter sequences, export in 16 bits, or take a machine with more memory",
        ) from error
    if (failure := _CUDA.search(said)) is not None:
        raise BackendUnavailableError(
            f"{name}: {failure[0].strip()}",
            hint="the driver is older than this ONNX Runtime's CUDA, the GPU is none its kernels were built for, or an "
            "earlier fault left it unusable: `nvidia-smi` shows the driver, --provider cpu needs none",
        ) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]
