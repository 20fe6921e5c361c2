"""JSON objects in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputError


def read_json(path: Path, error: type[InputError] = InputError) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        InputError: The file is missing, is not UTF-8 JSON, or holds something else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise error(f"{path}: cannot be read as JSON ({err})", hint="is it complete?") from err
    if not isinstance(values, dict):
        raise error(f"{path}: holds a JSON {type(values).__name__}, expected an object")
    return values


def save_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, in ASCII (a checkpoint may hold text that UTF-8 cannot), with a final newline."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
