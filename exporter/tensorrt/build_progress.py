"""How far an engine build is, from TensorRT's nested phases."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

_SECONDS_BETWEEN = 0.1  # a build reports thousands of steps


class PhaseProgress:
    """Turns phases and steps into one fraction; TensorRT calls from several threads (IProgressMonitor).

    A phase of n steps is done by the share of its finished steps, the step under way counting by its sub-phase. The
    same phase may run again, so the fraction told never falls.

    Args:
        tell: Called with the innermost phase's name and the fraction of the build, from 0 to 1.
    """

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self._tell, self._lock = tell, threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._told, self._told_at = 0.0, 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(1, steps))
            self._report(name)

    def step(self, name: str, step: int) -> None:
        """Step number `step` of a phase is finished."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._report(name)

    def finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(name, None)

    def monitor(self, trt: Any) -> Any:
        """The object TensorRT reports to."""
        progress = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                progress.start(name, parent, steps)

            def step_complete(self, name: str, step: int) -> bool:
                progress.step(name, step)
                return True  # go on

            def phase_finish(self, name: str) -> None:
                progress.finish(name)

        return Monitor()

    def _report(self, name: str) -> None:
        fraction, child, current = 0.0, 0.0, self._phases.get(name)
        while current is not None:
            fraction = child = min(1.0, (current.done + child) / current.steps)
            current = self._phases.get(current.parent) if current.parent else None
        self._told = max(self._told, fraction)
        if time.monotonic() - self._told_at >= _SECONDS_BETWEEN:
            self._told_at = time.monotonic()
            self._tell(name, self._told)


class _Phase:
    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent, self.steps, self.done = parent, steps, 0
