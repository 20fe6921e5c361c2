"""Other programs, each in an environment of its own under .peers/, made from a file of pinned requirements."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.common.workspace import WORKSPACE, alone_in, temporary_folder
from dlo_export.checkpoints.errors import MachineError

# Installed first and by its exact version: a range would pull the newest CUDA build.
TORCH = "torch==2.13.0"
_INSTALLED = "installed-requirements.txt"


def peer_environment(name: str, requirements: Path | None = None) -> Path:
    """The bin folder of a peer's virtual environment, which is made on first use, by one process at a time.

    Args:
        name: "mobius", "optimum", or any other with a file of requirements.
        requirements: That file; benchmarks/requirements-<name>.txt by default.

    Raises:
        MachineError: The installation failed; pip has said why.
    """
    requirements = requirements or requirements_of(name)
    environment = WORKSPACE / name
    if not is_installed(name, requirements):
        with alone_in(environment):  # --clear would empty what another process is filling
            if not is_installed(name, requirements):
                _install(name, environment, requirements)
    return environment / "bin"


def _install(name: str, environment: Path, requirements: Path) -> None:
    """Makes an environment anew; what is there counts once it is complete."""
    print(f"installing {name} into {environment}", file=sys.stderr)
    commands = [[sys.executable, "-m", "venv", "--clear", str(environment)]]
    torch = [[TORCH]] if TORCH in requirements.read_text().splitlines() else []
    for wanted in (*torch, ["-r", str(requirements)]):
        pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        commands.append([*pip, *wanted])
    with temporary_folder() as scratch:  # pip unpacks and compiles gigabytes there, which a Ctrl-C would leave
        for command in commands:
            if code := subprocess.run(command, check=False, env={**os.environ, "TMPDIR": str(scratch)}).returncode:
                hint = f"what failed has said why: {shlex.join(command)}"
                raise MachineError(f"{name} cannot be installed: that ended with {code}", hint=hint)
    (environment / _INSTALLED).write_text(requirements.read_text())


def peer_program(name: str, program: str) -> tuple[Path, ...]:
    """A command of a peer's environment, run by its Python: the file itself names the folder it was installed in.

    Args:
        name: Of the environment, as for `peer_environment`.
        program: "python" is the Python itself.
    """
    folder = peer_environment(name)
    return (folder / "python",) if program == "python" else (folder / "python", folder / program)


def requirements_of(name: str) -> Path:
    """A benchmarked peer's file of requirements."""
    return Path(__file__).parents[1] / f"requirements-{name}.txt"


def is_installed(name: str, requirements: Path) -> bool:
    """Whether a peer's environment is complete and of these requirements."""
    installed = WORKSPACE / name / _INSTALLED
    return installed.exists() and installed.read_text() == requirements.read_text()
