"""JSON objects in files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.regular_file import regular_size

# Far above any tokenizer.json, which are the largest.
MAX_BYTES = 1 << 28

_FLAT_LIST = re.compile(r"\[\n[^\[\]{}]*\n\s*\]")
_LINE_BREAK = re.compile(r"\n\s*")


def read_json(path: Path, error: type[InputError] = InputError, *, origin: Path | None = None) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        error: What to raise.
        origin: The file it is a copy of, to be named in its place.

    Raises:
        InputError: The file is missing, larger than `MAX_BYTES`, is not UTF-8 JSON, or holds something else than an
            object.
    """
    name = origin or path
    try:
        size = regular_size(path)
        # Nothing is read of a file that is too large: parsed, it would take many times its size.
        values = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as err:
        raise error(f"{name}: cannot be read as JSON ({err})", hint="is it complete?") from err
    if size > MAX_BYTES:
        raise error(f"{name}: has {size} bytes, expected at most {MAX_BYTES}", hint="is it the right file?")
    if not isinstance(values, dict):
        raise error(f"{name}: holds a JSON {type(values).__name__}, expected an object", hint="is it the right file?")
    return values


def json_text(values: Mapping[str, Any]) -> str:
    """A JSON object to be read by people: indented, but lists of numbers and names on one line.

    In ASCII, because a checkpoint may hold text that UTF-8 cannot.
    """
    indented = json.dumps(values, indent=2)
    # A line break in it is never part of a string: JSON escapes those.
    return _FLAT_LIST.sub(lambda match: _LINE_BREAK.sub(" ", match[0]).replace("[ ", "[").replace(" ]", "]"), indented)


def save_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object as `json_text`, with a final newline."""
    path.write_text(json_text(values) + "\n", encoding="utf-8")


def finite(values: Any) -> Any:
    """JSON values with null for NaN and infinity, which JSON cannot say."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, Mapping):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return values
