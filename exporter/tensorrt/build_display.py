"""Shows builds that run side by side: a bar each on a terminal, a line per stage with -v."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.tensorrt.engine_request import EngineRequest


@contextmanager
def show_builds(reporter: Reporter) -> Iterator[Callable[[EngineRequest], Callable[[dict[str, Any]], None]]]:
    """Yields what makes a listener for the events of one build.

    Args:
        reporter: Where to show them.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    console = reporter.console
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def listener(request: EngineRequest) -> Callable[[dict[str, Any]], None]:
            task = progress.add_task(f"engine {request.output.name}", total=1.0, doing="import")

            def listen(event: dict[str, Any]) -> None:
                kind = event["event"]
                if kind == "stage_started":
                    progress.update(task, doing=event["name"])
                elif kind == "progress":
                    progress.update(task, completed=event["fraction"], doing=event["phase"])
                elif kind == "stage_finished":
                    gigabytes = event["peak_bytes"] / 2**30
                    cost = f"{event['seconds']:.2f} s, {gigabytes:.2f} GB at most"
                    reporter.detail(f"engine {request.output.name}: {event['name']}: {cost}")
                elif kind == "log":
                    reporter.detail(f"engine {request.output.name}: {event['severity']}: {event['text']}")

            return listen

        yield listener
