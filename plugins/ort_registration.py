"""Gives ONNX Runtime the `dlo` operators: libdlo_ort.so, registered with a session's options."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from dlo_export.graph_passes.spec.ops import VERSION
from dlo_export.plugins.errors import PluginLibraryError
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE, build_hint
from dlo_export.plugins.shared_object import file_problem

LIBRARY: Final = "libdlo_ort.so"
_BUILD = build_hint("ORT_INCLUDE=<folder with onnxruntime_c_api.h>")


def check_library(path: Path) -> None:
    """Loads the library and asks it which operators it has.

    Args:
        path: The library.

    Raises:
        PluginLibraryError: It is missing, cut short, does not load here, is another library, or of another version.
    """
    if (problem := file_problem(path, LIBRARY)) is not None:
        raise PluginLibraryError(f"plugin library {path}: {problem}", hint=_BUILD)
    try:
        # An absolute path: a bare name would be looked for in the system's folders.
        library = ctypes.CDLL(os.fspath(path.absolute()))
    except OSError as err:
        raise PluginLibraryError(f"plugin library {path}: does not load here: {err}", hint=_BUILD) from err
    try:
        found = library.dlo_operator_version()
    except AttributeError as err:
        raise PluginLibraryError(f"plugin library {path}: is not {LIBRARY}", hint=_BUILD) from err
    if found != VERSION:
        raise PluginLibraryError(
            f"plugin library {path}: has version {found} of the dlo operators; expected {VERSION}", hint=_BUILD
        )


def register_library(options: Any, path: Path) -> None:
    """Registers the library with the options of a session, before the session is made.

    Args:
        options: ONNX Runtime's SessionOptions.
        path: The library.

    Raises:
        PluginLibraryError: As `check_library` says, or ONNX Runtime refuses it: one that is too old, for example.
    """
    check_library(path)
    try:
        options.register_custom_ops_library(os.fspath(path.absolute()))
    except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
        raise PluginLibraryError(f"plugin library {path}: ONNX Runtime refuses it: {err}", hint=_BUILD) from err


def no_library(operators: Sequence[str]) -> PluginLibraryError:
    """What there is to say where a graph has `dlo` operators and no library is given.

    Args:
        operators: Those of the graph, such as "dlo::SkipDown".
    """
    return PluginLibraryError(
        f"{', '.join(operators)}: ONNX Runtime computes them with {LIBRARY} alone, and none is given",
        hint=f"give --ort-plugin-library or set {ORT_LIBRARY_VARIABLE}; {_BUILD}",
    )
