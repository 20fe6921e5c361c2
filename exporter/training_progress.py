"""How training is going: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dlo_export.modeling.training.reports import StepReport

_LINE_SECONDS = 30.0


class TrainingProgress:
    """Shows steps, loss, active rate, tokens per second and the time left.

    Args:
        console: On stderr.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._progress.add_task("training", total=None, visible=False, values="")
        self._started = self._line_at = time.monotonic()
        self._first_step: int | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, report: StepReport) -> None:
        """Takes a step that is done."""
        active = "" if report.active is None else f", active {report.active:.1%}"
        values = f"loss {report.loss:.3f}{active}, {report.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=report.step, total=report.steps, visible=True, values=values)
        now = time.monotonic()
        if self._first_step is None:  # the clock starts with the second step: the first one warms up
            self._first_step, self._started = report.step, now
        if not self._console.is_terminal and (now - self._line_at > _LINE_SECONDS or report.step == report.steps):
            self._line_at = now
            done = report.step - self._first_step
            left = f", {(now - self._started) / done * (report.steps - report.step):,.0f} s left" if done else ""
            self._console.print(
                f"step {report.step} of {report.steps}: {values}{left}", highlight=False, markup=False, soft_wrap=True
            )
