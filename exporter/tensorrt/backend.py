"""Which of the two TensorRTs builds, and whether it can here."""

from __future__ import annotations

import sys
from typing import Literal

from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.runtimes.artefact.engine_record import BackendName
from dlo_export.runtimes.tensorrt.backend import BACKENDS, Backend
from dlo_export.runtimes.tensorrt.gpu import Gpu, find_gpu

BackendChoice = Literal["auto", "tensorrt", "rtx"]


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
        if backend.targets is None:
            reason, portable = f"it builds only for the GPU it runs on, {gpu.target}", ""
        else:
            reason, portable = f"it builds for {', '.join(possible)}", " for an engine that runs on all of them"
        raise InputError(
            f"--trt-target: {backend.title} cannot build for {', '.join(wrong)}: {reason}",
            hint=f"choose among those, or leave --trt-target out{portable}",
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
