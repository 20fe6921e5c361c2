"""How often the kernel has killed processes for lack of memory."""

from __future__ import annotations

from pathlib import Path

_VMSTAT = Path("/proc/vmstat")
_CGROUP = Path("/sys/fs/cgroup")


def count_oom_kills(vmstat: Path = _VMSTAT, cgroup: Path = _CGROUP) -> int:
    """Kills so far, of the machine and of this control group; only a growing number means something.

    Args:
        vmstat: Linux's /proc/vmstat; elsewhere missing, and 0 is returned.
        cgroup: Root of the control group (v2); its counter also grows where a container cannot see the machine's.
    """
    files = (vmstat, cgroup / "memory.events")
    lines = [line.split() for file in files if file.exists() for line in file.read_text().splitlines()]
    return sum(int(number) for name, number in lines if name == "oom_kill")
