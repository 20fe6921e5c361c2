"""A command in a process of its own, and what it took of the machine."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from resource import struct_rusage


def run_measured(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None
) -> tuple[float, struct_rusage]:
    """Runs a command to its end; returns seconds, and what the kernel counted for it.

    Args:
        command: Program and arguments.
        log: Takes what it writes.
        environment: Of the process; this one's unless given.

    Raises:
        RuntimeError: It failed, with what it wrote.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # stopped: so is the command, before its output is removed
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}: ended with {process.returncode}\n{log.read_text(errors='replace')[-2000:]}")
    return seconds, usage
