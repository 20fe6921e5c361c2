"""Where the C++ libraries come from: how they are built, and where a user says that one lies."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Final

ORT_LIBRARY_VARIABLE: Final = "DLO_ORT_PLUGIN_LIBRARY"
"""Environment variable: path of libdlo_ort.so, where a command is not given `--ort-plugin-library`."""


def build_hint(headers: str) -> str:
    """The command that builds a library, for whoever lacks it.

    Args:
        headers: The argument that says where the runtime's headers are.
    """
    # The sources come with the package, wherever it is installed; the folder may not be the user's to write to.
    return (
        f"build it: make -C {shlex.quote(str(Path(__file__).parent / 'library'))} PYTHON={shlex.quote(sys.executable)} "
        f'BUILD="$PWD/build" {headers}'
    )
