"""How much of the machine other programs took meanwhile: a measurement they disturbed is repeated."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class ForeignLoad:
    """Watches from its creation on. Linux only; elsewhere nothing is ever seen.

    CPU time of this process and of the children it has waited for is its own; all other is foreign.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float:
        """Foreign CPU time since the creation, as a share of all CPUs' time."""
        start, busy, own = self._start
        elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / elapsed


def wait_for_quiet(limit: float, seconds: float) -> None:
    """Returns when a second has passed with less foreign load than the limit, or after so many seconds anyway."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        load = ForeignLoad()
        time.sleep(1)
        if load.share() < limit:
            return


def _busy_seconds() -> float:
    if not _STAT.exists():
        return 0.0
    # user nice system idle iowait irq softirq steal, in clock ticks, of all CPUs
    ticks = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
