"""What --json prints."""

from __future__ import annotations

import json
from typing import Any

import typer

from dlo_export.checkpoints.files.json_file import finite


def print_json(values: dict[str, Any], *, indent: int | None = 2) -> None:
    """Prints valid JSON to stdout: NaN and infinity, which JSON has not, are null."""
    typer.echo(json.dumps(finite(values), indent=indent, allow_nan=False))
