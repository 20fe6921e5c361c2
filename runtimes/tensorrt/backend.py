"""TensorRT and TensorRT-RTX: what differs between the two, for who builds engines and for who runs them.

The `tensorrt` half needs a GPU and has not been run on one yet.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from typing import Any

from dlo_export.checkpoints.errors import MachineError
from dlo_export.runtimes.artefact.engine_record import BackendName


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
        """Whether a log line says nothing about what went wrong.

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
