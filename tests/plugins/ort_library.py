"""libdlo_ort.so, built once for all processes of a test run, and not again while its sources stay as they are."""

import fcntl
import functools
import subprocess
import sys
from pathlib import Path

from tests.ort_headers import ort_headers

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "ort-library"


@functools.cache
def built_library() -> Path:
    """Without GPU kernels, which take a minute to compile; skips the test where there are no headers."""
    headers = ort_headers("onnxruntime_c_api.h")
    BUILD.mkdir(parents=True, exist_ok=True)
    command = ["make", "-C", str(ROOT / "plugins" / "library"), f"PYTHON={sys.executable}", f"ORT_INCLUDE={headers}"]
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([*command, "TensorRT_ROOT=", "DLO_TARGETS=none", f"BUILD={BUILD}"], check=True)
    return BUILD / "libdlo_ort.so"
