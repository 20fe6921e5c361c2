"""The one command that builds libdlo_plugins.so and libdlo_ort.so."""

import os
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "plugins" / "library"


def test_make_says_so_in_one_line_each_when_no_headers_are_given():
    environment = {name: value for name, value in os.environ.items() if name not in ("TensorRT_ROOT", "ORT_INCLUDE")}
    command = ["make", "--silent", "--no-print-directory", "-C", str(SOURCES)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines() == [
        "libdlo_plugins.so: skipped, TensorRT_ROOT is not given",
        "libdlo_ort.so: skipped, ORT_INCLUDE is not given",
    ]


def test_a_target_that_is_not_served_is_refused_when_generating(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dlo_export.plugins.library.generate",
        "--output",
        str(tmp_path),
        "--targets",
        "89,75",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SOURCES.parents[1])
    assert result.returncode == 2
    assert "75: not served; expected some of 80, 86, 89, 90, 100, 120" in result.stderr
    assert not list(tmp_path.iterdir())
