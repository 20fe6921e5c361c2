"""The commands and their options."""

from __future__ import annotations

import copy

import typer

from dlo_export import __version__
from dlo_export.exporter.commands import bench, calibrate, evaluate, expand, export, inspect, parity, run, train
from dlo_export.exporter.commands.command import Command

app = typer.Typer(
    name="dlo",
    help="Export, deepen, train, calibrate, run and evaluate dynamically routed Llama models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (export, expand, train, calibrate, run, bench, evaluate, inspect, parity):
    app.command(command.NAME, cls=Command)(command.main)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dlo-export {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    # By a callback of its own, which runs before a command is asked for.
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    del version


def app_for(arguments: list[str]) -> typer.Typer:
    """The app with the one command that the arguments begin with, or with all of them where they begin with none.

    Options are made of signatures at every start: those of all commands take a tenth of a second.
    """
    asked = [command for command in app.registered_commands if arguments[:1] == [command.name]]
    if not asked:
        return app
    alone = copy.copy(app)
    alone.registered_commands = asked
    return alone
