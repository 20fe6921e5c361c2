"""Commands in processes that have everything imported: quick to start, and every moment is one of their work."""

import dataclasses
import multiprocessing
import os
import resource
import signal
from pathlib import Path

from dlo_export.exporter.cli import main

# What commands import when they need it.
_MODULES = (
    *("exporter.app", "exporter.artefact_check", "exporter.artefact_runner", "exporter.calibrate", "exporter.export"),
    *("exporter.evaluate", "runtimes.torch.scorer"),
    *("exporter.commands.expand", "exporter.inspection", "exporter.parity_check", "exporter.train"),
    *("runtimes.bench", "runtimes.generation.generate", "runtimes.generation.tokenizer", "runtimes.torch.reference"),
)
_LIMITED = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
}


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, as subprocess gives it, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def start(arguments, messages: Path, *, working_folder: Path | None = None, limits=None):
    """Starts a command, and returns its process when it is about to begin.

    Args:
        arguments: Of `dlo`.
        messages: Files its stdout and stderr go to, with these as suffixes.
        working_folder: The current one by default.
        limits: Of the process: "cpu_seconds", "memory_bytes" and "file_bytes"; none by default.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(f"dlo_export.{module}" for module in _MODULES)])
    ready, begins = context.Pipe(duplex=False)
    process = context.Process(
        target=_run,
        args=([*map(str, arguments)], str(messages), str(working_folder or os.getcwd()), limits or {}, begins),
    )
    process.start()
    ready.recv()
    return process


def run(*arguments, messages: Path):
    """Runs a command to its end."""
    process = start(arguments, messages)
    process.join()
    return ended(process, messages)


def ended(process, messages: Path):
    """What came of a command."""
    stdout, stderr = (messages.with_suffix(suffix).read_text() for suffix in (".stdout", ".stderr"))
    return Ended(process.exitcode, stdout, stderr)


def _run(arguments, messages, folder, limits, begins):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a process that has just started
    os.chdir(folder)
    for number, suffix in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(messages + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name, limit in limits.items():
        resource.setrlimit(_LIMITED[name], (limit, limit))
    begins.send(None)
    main(arguments)
