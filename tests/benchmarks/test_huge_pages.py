"""Benchmarks start themselves over with an allocator that takes huge pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from benchmarks.common.huge_pages import use_huge_pages
use_huge_pages()
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's tunables")
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_command_starts_over_with_tunables_and_its_arguments_unless_somebody_has_set_some(own: str | None) -> None:
    variable = "GLIBC_TUNABLES"
    environment = {name: value for name, value in os.environ.items() if name != variable} | (
        {variable: own} if own else {}
    )
    command = [sys.executable, "-c", PROGRAM, "--threads", "2"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    tunables, *arguments = ended.stdout.split()
    assert arguments == ["--threads", "2"]
    assert tunables == own if own else "glibc.malloc.hugetlb=1" in tunables
