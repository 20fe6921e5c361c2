"""ONNX Runtime's errors that are the machine's, told from the model's by what they say."""

from __future__ import annotations

import re

from dlo_export.runtimes.errors import BackendUnavailableError, ProviderUnavailableError

NOT_STARTED_HINT = (
    "it needs a GPU, NVIDIA's driver (`nvidia-smi` shows both) and the libraries of its CUDA version: pip install "
    "'onnxruntime-gpu[cuda,cudnn]' brings these; or take --provider cpu"
)
"""What to do where a provider is installed and does not start."""

# What its arenas, allocators and CUDA itself say; and what a driver or GPU says that its kernels were not built for.
_OUT_OF_MEMORY = re.compile(r"Failed to allocate memory|out of memory|bad_alloc|bad allocation", re.IGNORECASE)
# CUDA itself cannot be used: no driver, no GPU, or none that this ONNX Runtime was built for.
_NO_CUDA = re.compile(
    r"no CUDA-capable device|driver version is insufficient|no kernel image|initialization error|"
    r"Failed to load library|Failed to load shared library|unable to be loaded|wasnt able to be loaded",
    re.IGNORECASE,
)
_CUDA = re.compile(r"(CUDA|CUBLAS|CUDNN|CURAND) (failure|error) \d+[^;]*", re.IGNORECASE)


def check_machine(name: str, error: Exception) -> None:
    """Raises what an error of ONNX Runtime means, if it is the machine's.

    Args:
        name: Of the model.
        error: As ONNX Runtime raised it.

    Raises:
        ProviderUnavailableError: CUDA does not start here.
        BackendUnavailableError: Memory is full, or CUDA failed.
    """
    said = str(error)
    if _OUT_OF_MEMORY.search(said):
        raise BackendUnavailableError(
            f"{name}: ONNX Runtime found no memory left: {_first_line(said)}",
            hint="feed a smaller batch or shorter sequences, export in 16 bits, or take a machine with more memory",
        ) from error
    if _NO_CUDA.search(said):
        raise ProviderUnavailableError(
            f"{name}: CUDA does not start here: {_first_line(said)}", hint=NOT_STARTED_HINT
        ) from error
    if (failure := _CUDA.search(said)) is not None:
        raise BackendUnavailableError(
            f"{name}: {failure[0].strip()}",
            hint="the GPU refused a kernel, or an earlier fault left it unusable (`nvidia-smi` shows its state); "
            "--provider cpu needs none",
        ) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]
