"""Gives enterprise TensorRT the `dlo` plugins, for the engine builder and for runners.

Not run against enterprise TensorRT's own library here: it needs a GPU. `register_quick_deploy` has been run with its
Python module on TensorRT-RTX's library (tests/plugins/test_quick_deploy.py).
"""

from __future__ import annotations

from pathlib import Path

from dlo_export.plugins import registration


def register_quick_deploy() -> None:
    """Registers the quick-deploy plugins for building; repeating it is harmless.

    Engines built with them carry the kernels and need no library to run.

    Raises:
        ModuleNotFoundError: tensorrt or triton is not installed.
    """
    import dlo_export.plugins.quick_deploy  # noqa: F401, PLC0415 - its decorators register


def load_library(path: Path | str) -> None:
    """Loads `libdlo_plugins.so`, for building with the C++ plugins and for running engines built so.

    Raises:
        PluginError: The file is missing, cannot be loaded, or does not bring every `dlo` plugin.
        ModuleNotFoundError: tensorrt is not installed.
    """
    import tensorrt as trt  # noqa: PLC0415 - heavy

    registration.require_file(Path(path))
    registration.load_into_registry(trt, Path(path))


def missing_creators() -> tuple[str, ...]:
    """Names of the `dlo` plugins that enterprise TensorRT's registry does not hold."""
    import tensorrt as trt  # noqa: PLC0415 - heavy

    return registration.missing_creators(trt)
