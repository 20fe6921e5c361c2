"""Progress on stderr: bytes, rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dlo_export.exporter.messages import printable


class Reporter:
    """Tells the user what a long command is doing.

    Args:
        verbose: Print how long each stage took, terminal or not.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self.console = Console(stderr=True)
        self._verbose = verbose

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows a spinner with the stage's name while the block runs."""
        start = time.perf_counter()
        if self.console.is_terminal:
            with self.console.status(name):
                yield
        else:
            yield
        self._done(name, start)

    @contextlib.contextmanager
    def bytes(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar; the block calls what it is given with (bytes done, bytes in all)."""
        with self._bar(name, DownloadColumn(), TransferSpeedColumn()) as progress:
            yield progress

    @contextlib.contextmanager
    def count(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar; the block calls what it is given with (steps done, steps in all)."""
        with self._bar(name, MofNCompleteColumn()) as progress:
            yield progress

    @contextlib.contextmanager
    def _bar(self, name: str, *amounts: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        columns = (TextColumn(name), BarColumn(), *amounts, TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        self._done(name, start)

    def detail(self, text: str) -> None:
        """A line for those who asked for details."""
        if self._verbose:
            self.console.print(printable(text), highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A line everyone gets."""
        self.console.print(f"warning: {printable(text)}", highlight=False, markup=False, soft_wrap=True)

    def _done(self, name: str, start: float) -> None:
        self.detail(f"{name}: {time.perf_counter() - start:.2f} s")
