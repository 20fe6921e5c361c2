"""Weights in huge pages: where they lie in memory is then the same for all candidates of a benchmark.

In pages of 4 KiB, which ones a session gets moves a step that reads its weights from memory by up to a tenth for as
long as the session lives, more than most candidates differ by; whoever loads first fares worst. glibc (2.35 or newer)
asks the kernel for pages of 2 MiB where it is told to, and packs what is smaller than them into the same ones where
such blocks come from its heap. Sessions of one graph then differ by less.
"""

from __future__ import annotations

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLES = {
    "glibc.malloc.hugetlb": "1",  # madvise: as many as the kernel has
    "glibc.malloc.mmap_threshold": str(32 << 20),  # a block of its own is cut to pages of 4 KiB at both ends
    "glibc.malloc.trim_threshold": str(4 << 30),
}
ENVIRONMENT = {_VARIABLE: ":".join(f"{name}={value}" for name, value in _TUNABLES.items())}
"""What a process is to be started with."""


def use_huge_pages() -> None:
    """Starts the running command over with the tunables set, once; what it starts inherits them.

    For a benchmark's `main`, once its arguments are read and before anything is loaded. Linux only; an allocator other
    than glibc's takes no notice, and tunables that somebody has set stand.
    """
    if sys.platform != "linux" or _VARIABLE in os.environ:
        return
    os.environ.update(ENVIRONMENT)
    os.execv(sys.executable, sys.orig_argv)
