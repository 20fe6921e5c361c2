"""Runs `dlo-export` and prints the repository's files in the order they first did something.

Importing a file is not doing something: what counts is a call of one of its functions from another one.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType

from dlo_export.exporter.cli import export_main

ROOT = Path(__file__).parents[1]


def executed_files(arguments: list[str]) -> list[str]:
    """Paths relative to the repository, in the order of the first call into each."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or not code.co_flags & inspect.CO_OPTIMIZED or code.co_filename in found:
            return
        while caller is not None and caller.f_code.co_name.startswith("<"):
            if caller.f_code.co_name == "<module>" and caller.f_code.co_filename != __file__:
                return
            caller = caller.f_back
        if code.co_filename.startswith(str(ROOT)):
            found[code.co_filename] = None

    sys.argv = ["dlo-export", *arguments]
    sys.setprofile(note)
    try:
        export_main()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.setprofile(None)
    return [str(Path(file).resolve().relative_to(ROOT)) for file in found]


def print_executed_files(arguments: list[str]) -> None:
    """One a line, behind what the command itself prints."""
    print(*executed_files(arguments), sep="\n")
