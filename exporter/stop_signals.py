"""Interrupts, terminations and hang-ups, each ending a command by way of its clean-up."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dlo_export.checkpoints.files.uninterrupted import SIGNALS

# Long enough for the clean-up that the first signal causes, short enough for whoever sees that nothing happens.
_REPEATED_SECONDS = 1.0


class StopSignals:
    """Takes the signals that stop a command, from its construction on.

    What the shell had ignored (nohup, a job in the background) stays ignored.

    Attributes:
        exit_code: 130 or 143, by the first signal that came; None until one does.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._raising = False
        self._raised_at = -_REPEATED_SECONDS
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raises KeyboardInterrupt where the block is when a signal comes; elsewhere a signal is noted alone."""
        self._raising = True
        try:
            if self.exit_code is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code is None:
            # A closed terminal is a termination: nobody reads what the difference would say.
            self.exit_code = 130 if number == signal.SIGINT else 143
        # A second one at once would cut off the clean-up that the first one caused. A later one is another request:
        # libraries may have swallowed the first.
        if self._raising and time.monotonic() - self._raised_at >= _REPEATED_SECONDS:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt
