"""What all commands do with their arguments."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperCommand

from dlo_export.checkpoints.errors import MachineError

# Text that may be empty: what to continue, and targets, of which none means every one.
_MAY_BE_EMPTY = {"prompt", "trt_target"}


class Command(TyperCommand):
    """A command that has a current folder, and takes no empty argument: as a path, it would mean that folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses and converts all arguments.

        Raises:
            typer.BadParameter: One is empty, and must not be.
            MachineError: The current folder is gone. Libraries end the process where they notice.
        """
        # As they stand on the command line: once converted, an empty path is a dot.
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        parameter: Any  # typer's base class of it has no public name
        for parameter in self.params:
            value = given.get(parameter.name or "")
            values = value if isinstance(value, (list, tuple)) else (value,)
            if "" in values and parameter.name not in _MAY_BE_EMPTY:
                raise typer.BadParameter("it is empty", ctx=ctx, param=parameter)
        try:
            os.getcwd()
        except OSError as err:
            raise MachineError(f"the current folder: {err.strerror}", hint="change to one that is there") from err
        return rest
