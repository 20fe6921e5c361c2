"""The one command that builds libdlo_plugins.so."""

import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "plugins" / "library"


def test_make_says_so_in_one_line_when_no_headers_are_given():
    environment = {name: value for name, value in os.environ.items() if name != "TensorRT_ROOT"}
    command = ["make", "--silent", "--no-print-directory", "-C", str(SOURCES)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines() == ["libdlo_plugins.so: skipped, TensorRT_ROOT is not given"]
