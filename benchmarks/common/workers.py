"""One process per candidate: each has its own thread pool, allocator and memory, as a user's program would.

Sessions sharing a process disturb each other: the idle one's threads spin. A worker announces itself with one line,
then reads numbers of runs from stdin and answers each with the runs' durations.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.common.foreign_load import ForeignLoad, wait_for_quiet
from benchmarks.common.measure import Samples, alternate, joined
from benchmarks.common.workspace import REPOSITORY

DISTURBED = 0.05  # of all CPUs' time
PATIENCE = 60  # seconds to wait for a quiet machine before each launch
MOST_REPEATS = 20
WAIT_POLICY = "OMP_WAIT_POLICY"


class WorkerFailedError(RuntimeError):
    """A worker ended before it answered; what it said stands on stderr."""


class Worker:
    """A candidate in a process of its own.

    Args:
        module: What runs there, for example ``benchmarks.common.onnxruntime_worker``; it calls `serve`.
        arguments: Of its command line; it runs in the repository, wherever this process does, so paths become whole.
        python: Interpreter to use.
        environment: What it finds there besides ours.
    """

    def __init__(
        self,
        module: str,
        *arguments: str | Path,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        words = [argument.absolute() if isinstance(argument, Path) else argument for argument in arguments]
        self._command = [str(python), "-m", module, *map(str, words)]
        # Whoever imports our runtimes has OpenMP's threads sleep while they wait. That is for PyTorch beside other
        # runtimes; a peer whose threads are OpenMP's takes three times as long, and a worker of ours says it itself.
        variables = {name: value for name, value in os.environ.items() if name != WAIT_POLICY} | {**(environment or {})}
        self._process = subprocess.Popen(
            self._command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        self.facts: dict[str, Any] = self._answer()

    def __call__(self, runs: int) -> Sequence[float]:
        """Runs the candidate; returns the duration of each run in milliseconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{runs}\n")
        self._process.stdin.flush()
        times: list[float] = self._answer()
        return times

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # At the end of its input the worker leaves by itself.
        self._process.communicate(timeout=60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailedError(f"{shlex.join(self._command)}: ended with status {self._process.wait()}")
        return json.loads(line)


def alternate_workers(
    start: Mapping[str, Callable[[], Worker]],
    *,
    launches: int,
    blocks: int,
    runs: int,
    settle: int,
    busy: bool = False,
) -> dict[str, Samples]:
    """Measures candidates that run in workers, in alternating blocks, over several launches of all of them.

    Where a process's weights lie in physical memory moves a bandwidth-bound step by up to ten percent for as long as
    the process lives; only new processes average that out. A launch that other programs disturbed is repeated, but not
    forever: stderr tells of those that count although they were disturbed.

    Args:
        start: Starts each candidate's worker.
        launches: How often all workers are started anew, each time beginning with the next of them: whose weights are
            loaded first finds memory in the smallest pieces, which costs a decode step up to a tenth. As many launches
            as there are candidates, or a multiple, favour nobody.
        blocks: Blocks per candidate and launch, see `alternate`.
        runs: Runs in a block that count.
        settle: Runs at the start of each block that do not.
        busy: Take the machine as it is: wait for nothing, repeat nothing. Ratios of alternating blocks stand more of
            that than times do.
    """
    parts: list[dict[str, Samples]] = []
    repeats = 0 if busy else MOST_REPEATS
    while len(parts) < launches:
        if not busy:
            wait_for_quiet(DISTURBED, PATIENCE)
        load = ForeignLoad()
        names = list(start)
        names = names[len(parts) % len(names) :] + names[: len(parts) % len(names)]
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(start[name]()) for name in names}
            ordered = {name: workers[name] for name in start}
            part = alternate(ordered, blocks=blocks, runs=runs, settle=settle)
        if (share := load.share()) > DISTURBED:
            if repeats:
                repeats -= 1
                continue
            print(f"other programs took {share:.0%} of the CPUs during a launch that counts", file=sys.stderr)
        parts.append(part)
    return joined(parts)


def launch_workers_in_turn(
    start: Mapping[str, Callable[[], Worker]],
    *,
    launches: int,
    runs: int,
    settle: int,
    busy: bool = False,
) -> dict[str, Samples]:
    """Measures candidates each of which has the machine to itself: none of the others' processes is alive meanwhile.

    Programs of different kinds do not wait alike: an idle session's threads spin for a while, and one that is merely
    alive can cost its neighbour time.

    Args:
        start: Starts each candidate's worker.
        launches: How often every candidate is started anew; every second time in reverse order.
        runs: Runs of a launch that count.
        settle: Runs at its start that do not.
        busy: Take the machine as it is, see `alternate_workers`.

    Returns:
        Of each candidate one sample per launch, the median of its runs: ratios are of neighbours in time.
    """
    values: dict[str, list[float]] = {name: [] for name in start}
    for launch in range(launches):
        for name in start if launch % 2 == 0 else reversed(list(start)):
            if not busy:
                wait_for_quiet(DISTURBED, PATIENCE)
            load = ForeignLoad()
            with start[name]() as worker:
                times = worker(settle + runs)[settle:]
            if (share := load.share()) > DISTURBED and not busy:
                print(f"{name}: other programs took {share:.0%} of the CPUs during a launch", file=sys.stderr)
            values[name].append(float(np.median(times)))
    return {name: Samples(np.array(numbers)) for name, numbers in values.items()}


def serve(run: Callable[[], object], facts: dict[str, Any], *, clock: Callable[[], float] = time.perf_counter) -> None:
    """The worker's side: answers until stdin ends.

    Args:
        run: The candidate.
        facts: What the parent may want to know, announced first.
        clock: In seconds.
    """
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        durations = []
        for _ in range(int(line)):
            start = clock()
            run()
            durations.append((clock() - start) * 1e3)
        print(json.dumps(durations), flush=True)
