"""Runs builds side by side, as many as memory and processors allow."""

from __future__ import annotations

import dataclasses
import os
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlo_export.exporter.tensorrt.build_outcome import outcome
from dlo_export.exporter.tensorrt.build_process import BuildProcess
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.runtimes.memory import available_memory

# Measured with TensorRT-RTX 1.7: importing and building a tiny graph, and what each byte of weights adds.
BASE_BYTES = 1 * 2**30
BYTES_PER_WEIGHT_BYTE = 4.2


@dataclasses.dataclass(frozen=True)
class Planned:
    """A build to run.

    Attributes:
        request: What to build.
        timing_cache: Its file, None for none.
        memory: Bytes it is expected to take at most.
        listener: Called with every event of it.
    """

    request: EngineRequest
    timing_cache: Path | None
    memory: int
    listener: Callable[[dict[str, Any]], None]


def expected_memory(weight_bytes: int) -> int:
    """Bytes a build takes at most, by the size of the graph's weights."""
    return int(BASE_BYTES + BYTES_PER_WEIGHT_BYTE * weight_bytes)


def run_builds(
    planned: Sequence[Planned], *, jobs: int | None = None, memory_limit: int | None = None
) -> list[tuple[BuildProcess, dict[str, Any]]]:
    """Runs builds in order, side by side where they fit; one that fits nowhere runs alone.

    When one fails, or the command is interrupted, the others are killed.

    Args:
        planned: The builds.
        jobs: Builds at once; the number of processors by default.
        memory_limit: Bytes for all of them; what is available by default.

    Returns:
        Of every build: the ended process and its result.

    Raises:
        EngineBuildError: A build failed.
        MachineError: Memory or disk ran out.
    """
    jobs = jobs or os.cpu_count() or 1
    budget = available_memory() if memory_limit is None else memory_limit
    waiting = deque(enumerate(planned))
    running: dict[int, tuple[BuildProcess, int]] = {}
    done: dict[int, tuple[BuildProcess, dict[str, Any]]] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                # In the order given: a large build that must wait is not overtaken for ever by small ones.
                while waiting and _fits(waiting[0][1], running, jobs, budget):
                    position, plan = waiting.popleft()
                    build = BuildProcess(plan.request, plan.timing_cache, plan.listener)
                    running[position] = (build, plan.memory)
                    for descriptor in (build.events, build.output):
                        selector.register(descriptor, selectors.EVENT_READ, build)
                # Sleeps until a build says something, ends, or has used up its time.
                _read(selector, [build for build, _ in running.values()])
                for position, (build, _) in list(running.items()):
                    if build.seconds_left == 0 and build.result is None:
                        build.timed_out = True
                        _unregister(selector, build)
                        build.kill()
                    if build.has_ended:
                        done[position] = (build, outcome(build))
                        del running[position]
        finally:
            for build, _ in running.values():
                _unregister(selector, build)
                build.kill()
    return [done[position] for position in range(len(planned))]


def _fits(plan: Planned, running: dict[int, tuple[BuildProcess, int]], jobs: int, budget: int) -> bool:
    taken = sum(memory for _, memory in running.values())
    return not running or (len(running) < jobs and taken + plan.memory <= budget)


def _read(selector: selectors.BaseSelector, builds: Sequence[BuildProcess]) -> None:
    left = [seconds for build in builds if (seconds := build.seconds_left) is not None]
    for key, _ in selector.select(min(left, default=None)):
        assert isinstance(key.fileobj, int)
        if not key.data.read(key.fileobj):
            selector.unregister(key.fileobj)


def _unregister(selector: selectors.BaseSelector, build: BuildProcess) -> None:
    for key in [key for key in selector.get_map().values() if key.data is build]:
        selector.unregister(key.fileobj)
