"""Commands in processes that have everything imported: quick to start, and every moment is one of their work."""

import ctypes
import dataclasses
import functools
import gc
import multiprocessing
import os
import resource
import signal
import tempfile
from pathlib import Path

from dlo_export.exporter.cli import main

# What commands import when they need it.
_MODULES = (
    *("exporter.app", "exporter.artefact_check", "exporter.artefact_runner", "exporter.calibrate", "exporter.export"),
    *("exporter.evaluate", "runtimes.torch.scorer"),
    *("exporter.commands.expand", "exporter.inspection", "exporter.parity_check", "exporter.train"),
    *("runtimes.bench", "runtimes.generation.generate", "runtimes.generation.tokenizer", "runtimes.torch.reference"),
    *("graph_passes.lowerings.lower_skip_to_compaction", "graph_passes.lowerings.lower_skip_to_if"),
    *("graph_passes.lowerings.lower_skip_to_plugin", "graph_passes.lowerings.lower_skip_to_topk"),
    *("graph_passes.lowerings.if_on_cuda", "graph_passes.lowerings.if_on_tensorrt", "graph_passes.lowerings.masked"),
)
_LIBRARY_MODULES = ("typer._adapters",)  # for the command line
_LIMITED = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory_bytes": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
}

_SAMPLE_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, as subprocess gives it, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def forkserver():
    """The context whose processes have everything imported: one list, since the first that starts one decides."""
    context = multiprocessing.get_context("forkserver")
    # pytest, because every process imports the main module of the one that starts it.
    modules = (f"dlo_export.{module}" for module in _MODULES)
    context.set_forkserver_preload(["pytest", __name__, *_LIBRARY_MODULES, *modules])
    return context


def start(
    arguments, messages: Path, *, working_folder: Path | None = None, limits=None, environment=None, privileged=True
):
    """Starts a command, and returns its process when it is about to begin.

    Args:
        arguments: Of `dlo`; or what is called in place of a command, without arguments and to be pickled.
        messages: Files its stdout and stderr go to, with these as suffixes.
        working_folder: The current one by default.
        limits: Of the process: "cpu_seconds", "memory_bytes" and "file_bytes"; none by default.
        environment: Variables it has beside those of this process.
        privileged: Leave root its right to read and write whatever permissions say.
    """
    work = arguments if callable(arguments) else functools.partial(main, [*map(str, arguments)])
    context = forkserver()
    ready, begins = context.Pipe(duplex=False)
    process = context.Process(
        target=_run,
        args=(
            work,
            str(messages),
            str(working_folder or os.getcwd()),
            limits or {},
            {**os.environ, **(environment or {})},
            privileged,
            begins,
        ),
    )
    process.start()
    ready.recv()
    return process


def run(*arguments, **options):
    """Runs a command to its end; options are those of `start`."""
    with tempfile.TemporaryDirectory() as folder:
        messages = Path(folder, "messages")
        process = start(arguments, messages, **options)
        process.join()
        return ended(process, messages)


def ended(process, messages: Path):
    """What came of a command."""
    stdout, stderr = (messages.with_suffix(suffix).read_text() for suffix in (".stdout", ".stderr"))
    return Ended(process.exitcode, stdout, stderr)


def join_unless_blocked(process, seconds):
    """Waits for a command's end, and kills it when it has been blocked for so long in all.

    Blocked is a process without a thread that runs, is ready to, waits for a disk, or was stopped by a signal: an
    overloaded machine makes it wait for a core, where it is ready, and a stopped one goes on when somebody lets it.
    What works without an end the limit on processor time ends.
    """
    blocked = 0.0
    while process.is_alive() and blocked < seconds:
        process.join(_SAMPLE_SECONDS)
        blocked += _SAMPLE_SECONDS if _is_blocked(process.pid) else 0
    if process.is_alive():
        process.kill()
    process.join()


def _is_blocked(pid):
    try:
        threads = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return False
    # "pid (name) state …", where a name may hold anything; proc_pid_stat(5).
    return not any(thread.rpartition(")")[2].split()[0] in "RDTt" for thread in threads)


def _give_up_privileges():
    """Lets permissions count for root as they do for anybody who owns the files; capabilities(7), capget(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable; the upper halves behind
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    for which in range(3):
        sets[which] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def _run(work, messages, folder, limits, environment, privileged, begins):
    gc.freeze()  # what was imported stays, and is searched for garbage no more
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # as in a process that has just started
    os.chdir(folder)
    os.environ.clear()  # those of the process that all are forked from
    os.environ |= environment
    for number, suffix in ((1, ".stdout"), (2, ".stderr")):
        os.dup2(os.open(messages + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name, limit in limits.items():
        resource.setrlimit(_LIMITED[name], (limit, limit))
    if not privileged:
        _give_up_privileges()
    begins.send(None)
    work()
