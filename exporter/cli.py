"""The `dlo` and `dlo-export` commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
import typer

from exporter import __version__
from exporter.commands import bench, calibrate, expand, export, inspect, parity, run
from exporter.exit_codes import INTERRUPTED, OUR_BUG, exit_code, report_error

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
    # A terminated command cleans up after itself as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(given, standalone_mode=False) or 0)
    except (KeyboardInterrupt, click.exceptions.Abort):
        report_error("interrupted")
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Exception as error:
        code = exit_code(error)
        if code == OUR_BUG and ("-v" in given or "--verbose" in given):
            raise
        report_error(error)
        sys.exit(code)


def export_main() -> NoReturn:
    """Runs `dlo-export`, which is `dlo export`."""
    main(["export", *sys.argv[1:]])
