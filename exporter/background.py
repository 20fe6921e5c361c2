"""A value computed beside other work, which nobody has to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BackgroundValue(Generic[Result]):
    """Computes in a thread that does not keep the process from ending: an export that fails ends at once.

    Args:
        compute: Releases the interpreter most of the time (hashing, reading), else it only takes time from the others.
    """

    def __init__(self, compute: Callable[[], Result]) -> None:
        self._compute = compute
        self._value: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> Result:
        """Waits for the value; raises what its computation raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set where there is no error

    def _run(self) -> None:
        try:
            self._value = self._compute()
        except BaseException as error:  # raised where the value is asked for
            self._error = error
