"""Processes beside each other, each of which says rows of a part of the GPU evidence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from benchmarks.gpu.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Process:
    """A module in a process of its own, which says its rows on stdout, a line each.

    Attributes:
        what: For a row, where it fails.
        module: Of this folder.
        arguments: Of its command line.
        needed: Whether it fails the part where it fails itself.
        fields: What its rows say of themselves, for the one that says that it failed.
    """

    what: str
    module: str
    arguments: tuple[str, ...] = ()
    needed: bool = True
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_processes(evidence: Evidence, processes: Sequence[Process], seconds: float, *, threads: int = 1) -> None:
    """Runs processes side by side, nothing being timed, and writes their rows as they end.

    What ends one of them, a CUDA error that poisons its process or the time, costs its own rows only.

    Args:
        evidence: Where rows go.
        processes: What to run.
        seconds: They may take; no more than is left, less what ending them takes.
        threads: Of each, for OpenMP.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for process in processes:
            # Rows go to a file, so that none waits for somebody to read; what else is said shows where it fails.
            rows, said = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            command = [sys.executable, "-m", f"benchmarks.{process.module}", *process.arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONFAULTHANDLER": "1"}
            started = subprocess.Popen(command, stdout=rows, stderr=said, env=environment)
            stack.callback(started.kill)  # of one that has ended it is nothing; this process may be stopped
            running.append((process, started, rows, said))
        end = time.monotonic() + min(seconds, max(5.0, evidence.left - 5.0))
        for process, started, rows, said in running:
            try:
                code = started.wait(timeout=max(0.1, end - time.monotonic()))
                problem = f"ended with {code}" if code else None
            except subprocess.TimeoutExpired:
                started.send_signal(signal.SIGABRT)  # so that it says where it is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(timeout=2)
                started.kill()
                started.wait()
                problem = "was not done in time"
            rows.seek(0)
            for line in rows:
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was ended
                    evidence.row(**json.loads(line))
            if problem is not None:
                said.seek(0)
                text = said.read()
                # Of a process that was ended, the frames it was in come first, and may be many.
                start = text.rfind("(most recent call first)")
                text = text[-2500:] if start < 0 else text[max(0, start - 500) : start + 2000]
                passed = False if process.needed else None
                evidence.row(process.what, passed=passed, **process.fields, error=f"{problem}: {text}")
