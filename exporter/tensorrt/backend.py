"""TensorRT and TensorRT-RTX: what differs between the two when an engine is built, and which of them is here.

The `tensorrt` half needs a GPU and has not been run on one yet.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
from typing import Any, Literal

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.exporter.tensorrt.engine_gpu import Gpu, find_gpu
from dlo_export.exporter.tensorrt.engine_request import BackendName

BackendChoice = Literal["auto", "tensorrt", "rtx"]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One of the two.

    Attributes:
        name: In options and records.
        title: In sentences.
        module: Python module.
        distributions: Packages that may bring the module, the first being the one to install.
        targets: GPUs it can build for ahead of time; None: only the GPU it runs on.
        keeps_timings: Whether a timing cache makes the next build faster. RTX tunes on the user's machine, so its
            timing cache is a no-op (deprecated since 1.2).
    """

    name: BackendName
    title: str
    module: str
    distributions: tuple[str, ...]
    targets: tuple[str, ...] | None
    keeps_timings: bool

    @property
    def install_hint(self) -> str:
        """How to get it."""
        extra = "rtx" if self.name == "rtx" else "tensorrt"
        return f"pip install 'dlo-export[{extra}]', which brings {self.distributions[0]}"

    def is_installed(self) -> bool:
        """Whether Python finds the module; it is not imported."""
        return importlib.util.find_spec(self.module) is not None

    def version(self) -> str:
        """Of the installed package.

        Raises:
            MachineError: It is not installed.
        """
        for distribution in self.distributions:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return str(self.load().__version__)

    def load(self) -> Any:
        """The module.

        Raises:
            MachineError: It is not installed, or its libraries cannot be loaded.
        """
        try:
            return importlib.import_module(self.module)
        except ImportError as err:
            found = "is not installed" if not self.is_installed() else f"cannot be imported: {err}"
            raise MachineError(
                f"{self.title}: the Python package {self.module} {found}", hint=self.install_hint
            ) from err

    def is_noise(self, line: str) -> bool:
        """Whether a log line says nothing about the build.

        After real errors RTX writes that there is no CUDA driver (cudaError 35, "driver version is insufficient"), and
        needs none to build ahead of time. The importer reminds of every int64 input that it is one.
        """
        return (self.name == "rtx" and "cudaError 35" in line) or "has Int64 binding" in line


BACKENDS: dict[BackendName, Backend] = {
    "rtx": Backend(
        "rtx",
        "TensorRT-RTX",
        "tensorrt_rtx",
        ("tensorrt-rtx",),
        ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        keeps_timings=False,
    ),
    "tensorrt": Backend(
        "tensorrt",
        "TensorRT",
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        None,
        keeps_timings=True,
    ),
}


def resolve_backend(choice: BackendChoice) -> tuple[BackendName, str]:
    """The backend to build with, and why that one.

    Raises:
        MachineError: What was asked for, or any of them, is not usable here.
    """
    gpu = find_gpu()
    if choice != "auto":
        _check_machine(BACKENDS[choice], gpu)
        return choice, "asked for"
    if BACKENDS["tensorrt"].is_installed() and gpu.target is not None:
        return "tensorrt", f"TensorRT is installed and can build for this machine's {gpu.target}"
    if BACKENDS["rtx"].is_installed():
        why = "TensorRT is not installed" if gpu.target is not None else "there is no GPU"
        return "rtx", f"{why}; TensorRT-RTX builds ahead of time without one"
    if BACKENDS["tensorrt"].is_installed():
        raise MachineError(
            f"--trt: TensorRT is installed but needs a GPU ({gpu.reason}), and TensorRT-RTX, which needs none, is not "
            "installed",
            hint=BACKENDS["rtx"].install_hint,
        )
    raise MachineError("--trt: neither TensorRT-RTX nor TensorRT is installed", hint=BACKENDS["rtx"].install_hint)


def check_backend(name: BackendName, targets: tuple[str, ...]) -> Backend:
    """What an engine is to be built with, once it is sure that it can be.

    Args:
        name: The backend.
        targets: As in an `EngineRequest`.

    Raises:
        MachineError: The backend or its GPU is missing.
        InputError: It cannot build for a target.
    """
    backend, gpu = BACKENDS[name], find_gpu()
    _check_machine(backend, gpu)
    possible = (str(gpu.target),) if backend.targets is None else backend.targets
    if wrong := sorted(set(targets) - set(possible)):
        reason = f"it builds only for the GPU it runs on, {gpu.target}" if backend.targets is None else "it builds for"
        listed = "" if backend.targets is None else f" {', '.join(possible)}"
        raise InputError(
            f"--trt-target: {backend.title} cannot build for {', '.join(wrong)}: {reason}{listed}",
            hint="choose among those, or leave --trt-target out"
            + (" for an engine that runs on all of them" if backend.targets else ""),
        )
    return backend


def _check_machine(backend: Backend, gpu: Gpu) -> None:
    if sys.platform != "linux":
        raise MachineError(
            f"{backend.title}: engines are built on Linux, this is {sys.platform}",
            hint="build on Linux, in WSL say; engines of TensorRT-RTX run on Windows too",
        )
    if not backend.is_installed():
        raise MachineError(
            f"{backend.title}: the Python package {backend.module} is not installed", hint=backend.install_hint
        )
    if backend.targets is None and gpu.target is None:
        raise MachineError(
            f"{backend.title}: building an engine needs a GPU, and {gpu.reason}",
            hint="use --trt-backend rtx, which builds ahead of time, or build on the machine with the GPU",
        )
