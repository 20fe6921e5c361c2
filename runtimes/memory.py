"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

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
