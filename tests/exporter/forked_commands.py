"""Commands in processes that have everything imported: quick to start, and every moment is one of their work."""

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path

from dlo_export.exporter.cli import main

_MODULES = ("app", "export", "calibrate", "train", "commands.expand")


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, as subprocess gives it, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def start(arguments, messages: Path):
    """Starts a command, and returns its process when it is about to begin.

    Args:
        arguments: Of `dlo`.
        messages: Files its stdout and stderr go to, with these as suffixes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(f"dlo_export.exporter.{module}" for module in _MODULES)])
    ready, begins = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=([*map(str, arguments)], str(messages), os.getcwd(), begins))
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


def _run(arguments, messages, folder, begins):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a process that has just started
    os.chdir(folder)
    for number, suffix in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(messages + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    begins.send(None)
    main(arguments)
