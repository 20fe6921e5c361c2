"""What a shared library's file says of its length and its functions, asked before the system maps it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

_ELF64: Final = b"\x7fELF\x02\x01"  # 64 bits, little-endian: every machine that this project builds for
# Of the header: where segments are listed, their entries' size and number; of an entry: where it lies, and how long.
_HEADER: Final = struct.Struct("<32xQ14xHH6x")
_SEGMENT: Final = struct.Struct("<8xQ16xQ16x")


def file_problem(path: Path, expected: str) -> str | None:
    """Why what lies at a path cannot be a library, in words; None where it may be one.

    Args:
        path: Of anything, or nothing.
        expected: Name of the library.
    """
    if not path.is_file():
        return f"{'is a folder' if path.is_dir() else 'no such file'}; expected {expected}"
    return "is cut short" if is_cut_short(path) else None


def is_cut_short(path: Path) -> bool:
    """Whether a library's segments go beyond its end, as those of one that was half copied do.

    The system maps such a file all the same, and ends the process with a bus error when it reads what is not there.

    Args:
        path: An existing file; what is no ELF of 64 bits is for the system to judge.
    """
    content = path.read_bytes()
    if not content.startswith(_ELF64):
        return False
    if len(content) < _HEADER.size:
        return True
    listed, entry_bytes, count = _HEADER.unpack_from(content)
    if listed + entry_bytes * count > len(content) or entry_bytes < _SEGMENT.size:
        return True
    entries = (_SEGMENT.unpack_from(content, listed + entry_bytes * index) for index in range(count))
    return any(offset + size > len(content) for offset, size in entries)


def has_name(path: Path, name: str) -> bool:
    """Whether a file holds a name as a library's table of functions does, where longer names may share its end.

    Args:
        path: An existing file.
        name: Of a function.
    """
    return f"{name}\0".encode() in path.read_bytes()
