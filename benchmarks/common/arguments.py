"""Types of arguments that several benchmarks take."""

from __future__ import annotations

import argparse
from pathlib import Path


def existing_file(text: str) -> Path:
    """A file's whole path; one that is not there ends the command before it makes anything.

    Raises:
        ArgumentTypeError: It is not there.
    """
    path = Path(text).absolute()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return path
