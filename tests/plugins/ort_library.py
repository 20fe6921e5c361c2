"""libdlo_ort.so, built once per test run against the headers that the environment variable ORT_INCLUDE points to."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "plugins" / "library"


@functools.cache
def built_library() -> Path:
    """Without GPU kernels, which take a minute to compile; skips the test where there are no headers."""
    headers = os.environ.get("ORT_INCLUDE")
    if not headers:
        pytest.skip("libdlo_ort.so: ORT_INCLUDE is not given")
    folder = _FOLDER.name
    command = ["make", "-C", str(SOURCES), f"PYTHON={sys.executable}", f"ORT_INCLUDE={headers}", "TensorRT_ROOT="]
    subprocess.run([*command, "DLO_TARGETS=none", f"BUILD={folder}"], check=True)
    return Path(folder) / "libdlo_ort.so"


_FOLDER = tempfile.TemporaryDirectory(prefix="dlo-ort-")  # removed when the process ends
