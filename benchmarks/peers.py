"""Other exporters, each in an environment of its own under .peers/, made from benchmarks/requirements-<peer>.txt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.workspace import WORKSPACE

# Installed first and by its exact version: a range would pull the newest CUDA build.
TORCH = "torch==2.13.0"


def peer_environment(name: str) -> Path:
    """The bin folder of a peer's virtual environment, which is made on first use.

    Args:
        name: "mobius" or "optimum".

    Raises:
        CalledProcessError: The installation failed; pip has said why.
    """
    requirements = Path(__file__).parent / f"requirements-{name}.txt"
    environment = WORKSPACE / name
    installed = environment / "installed-requirements.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"installing {name} into {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        for wanted in ([TORCH], ["-r", str(requirements)]):
            pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *wanted], check=True)
        installed.write_text(requirements.read_text())
    return environment / "bin"
