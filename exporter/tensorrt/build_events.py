"""What a building process tells its parent: one JSON object per line on a pipe of their own."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class EventPipe:
    """The writing end, in the building process.

    Args:
        descriptor: Of the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        """Sends one event; TensorRT's logger and progress monitor call from several threads."""
        view = memoryview(json.dumps({"event": event, **values}).encode() + b"\n")
        with self._lock:
            while view:
                view = view[os.write(self._descriptor, view) :]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tells of a stage's beginning and, when it succeeds, of what it took."""
        reset_peak_memory()
        start = time.perf_counter()
        self.send("stage_started", name=name)
        yield
        self.send("stage_finished", name=name, seconds=time.perf_counter() - start, peak_bytes=peak_memory())


class EventReader:
    """The reading end: bytes in, events out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Events that are complete with these bytes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def reset_peak_memory() -> None:
    """Lets the kernel count this process's largest resident memory anew (Linux, proc(5): clear_refs)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_memory() -> int:
    """Largest resident memory of this process, in bytes, since `reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; please report it with your kernel's version")
