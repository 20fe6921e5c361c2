"""Interrupts, terminations and hang-ups: each ends a command by way of its clean-up, or training between two steps."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dlo_export.checkpoints.files.uninterrupted import SIGNALS

# Long enough for the clean-up that the first signal causes, short enough for whoever sees that nothing happens.
_REPEATED_SECONDS = 1.0
_RETRY_SECONDS = 0.01


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
        self._number = 0
        self._show_unraisable, sys.unraisablehook = sys.unraisablehook, self._take_unraisable
        signal.signal(signal.SIGALRM, self._raise_again)
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
        self._number = number
        if self.exit_code is None:
            # A closed terminal is a termination: nobody reads what the difference would say.
            self.exit_code = 130 if number == signal.SIGINT else 143
        # A second one at once would cut off the clean-up that the first one caused. A later one is another request:
        # libraries may have swallowed the first.
        if self._raising and time.monotonic() - self._raised_at >= _REPEATED_SECONDS:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt

    def _take_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Tries again a moment later where Python has to drop what we raise: in finalizers and other callbacks."""
        if self._number and issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._raised_at = -_REPEATED_SECONDS
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        else:
            self._show_unraisable(unraisable)

    def _raise_again(self, number: int, frame: FrameType | None) -> None:
        # By the signal's own handler, which may be one that holds it back just now.
        signal.raise_signal(self._number)


@contextmanager
def stopped_between_steps() -> Iterator[Callable[[], bool]]:
    """Takes the first signal to stop as a wish, which the block is told of; the second one acts at once.

    Leaving the block, a signal that came acts as it would have: it ends the command.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    held = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def take(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in held.items():
            signal.signal(number, handler)

    for number in held:
        signal.signal(number, take)
    try:
        yield lambda: bool(came)
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])
