"""How much memory this process may still take, and what is said where that is too little."""

from __future__ import annotations

import os
from pathlib import Path

from dlo_export.runtimes.errors import BackendUnavailableError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes that can be allocated without swapping, within the container's limit where there is one.

    Args:
        meminfo: Linux's; elsewhere missing, and all physical memory counts as available.
        cgroup: Root of the control group (v2).
    """
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup / "memory.max"
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return available
    statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    # The group's page cache counts as used, and gives way when memory is asked for.
    used = int((cgroup / "memory.current").read_text()) - int(statistics["file"])
    return max(0, min(available, int(text) - used))


def check_memory(needed: int) -> None:
    """Refuses what memory does not hold, before it is filled: the system ends a process that fills it without a word.

    Args:
        needed: Bytes.

    Raises:
        BackendUnavailableError: There are fewer; whoever knows what for says how many are needed.
    """
    if needed > (free := available_memory()):
        raise BackendUnavailableError(f"{in_words(free)} of memory are free", hint="end what takes it, or ask for less")


def in_words(size: int) -> str:
    """A number of bytes in GB of 2^30, or in MB of 2^20 where they are less than one."""
    return f"{size / 2**30:,.1f} GB" if size >= 2**30 else f"{size / 2**20:,.1f} MB"
