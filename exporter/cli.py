"""The `dlo` and `dlo-export` commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from dlo_export import __version__
from dlo_export.exporter.commands import bench, calibrate, expand, export, inspect, parity, run
from dlo_export.exporter.exit_codes import INTERRUPTED, OUR_BUG, exit_code, report_error

app = typer.Typer(
    name="dlo",
    help="Export, deepen, calibrate and run dynamically routed Llama models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (export, expand, calibrate, run, bench, inspect, parity):
    app.command(command.NAME)(command.main)


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        typer.echo(f"dlo-export {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `dlo`, ending with DESIGN's exit codes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # A terminated command cleans up after itself as an interrupted one does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    sys.exit(_run(given, received))


def _run(given: list[str], received: list[int]) -> int:
    try:
        code = app(given, prog_name="dlo", standalone_mode=False) or 0
    except SystemExit as error:
        # Rich ends so when whoever reads the output has gone (`dlo inspect … | head`).
        return error.code if isinstance(error.code, int) else OUR_BUG
    except BaseException as error:
        # Libraries turn a KeyboardInterrupt into errors of their own, so what counts is that a signal came.
        if not received:
            code = exit_code(error)
            if code == OUR_BUG and {"-v", "--verbose"} & set(given):
                raise
            report_error(error)
            return code
    if received:
        report_error("interrupted")
        return INTERRUPTED
    return int(code)


def export_main() -> NoReturn:
    """Runs `dlo-export`, which is `dlo export`."""
    main(["export", *sys.argv[1:]])
