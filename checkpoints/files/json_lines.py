"""JSON objects in the lines of a file, which may be compressed by gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.regular_file import check_regular_file

SUFFIXES = (".jsonl", ".jsonl.gz")


class JsonLine(NamedTuple):
    """An object and where it stands: the file and the line, for errors."""

    origin: str
    values: dict[str, Any]


def is_json_lines(path: Path) -> bool:
    """Whether a file's name says that it is one."""
    return path.name.lower().endswith(SUFFIXES)


def read_json_lines(path: Path, error: type[InputError] = InputError) -> Iterator[JsonLine]:
    """Reads a file line by line; empty lines are left out, all text is Unicode.

    Args:
        path: Compressed where its name ends with .gz.
        error: What to raise.

    Raises:
        InputError: The file cannot be read, or a line is not a JSON object in UTF-8.
    """
    check_regular_file(path, error)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parsed(f"{path} line {number}", line, error)
    # What gzip says of a file that is cut short or is none.
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise error(f"{path}: cannot be read ({err})", hint="is it complete, and of the kind its name says?") from err


def line_value(line: bytes) -> Any:
    """The JSON value in a line.

    Raises:
        ValueError: It is none in UTF-8, or has a string that is no text.
        RecursionError: It is nested too deep.
    """
    value = json.loads(line.decode("utf-8-sig"))  # some programs begin a file by a byte order mark
    if b"\\u" in line:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # an escaped half of a surrogate pair is no text
    return value


def _parsed(origin: str, line: bytes, error: type[InputError]) -> JsonLine:
    try:
        values = line_value(line)
    except (ValueError, RecursionError) as err:
        raise error(f"{origin}: is not JSON in UTF-8 ({err})", hint="each line holds one JSON object") from err
    if not isinstance(values, dict):
        raise error(f"{origin}: is a JSON {type(values).__name__}, expected an object", hint="each line holds one")
    return JsonLine(origin, values)
