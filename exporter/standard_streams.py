"""stdout and stderr that are closed, full, or whose reader has gone."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO, cast


class _ForgivingStream:
    """A stream for messages: what nobody can read is dropped. What it cannot encode, it escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Makes both streams ones that can be written to without harm."""
    # A file opened while a standard stream is closed would get its number, and what libraries print would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name or a token that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, _ForgivingStream(sys.stderr))


def flush_stdout() -> None:
    """Writes what is left, so that its failure is noticed here and not while Python exits.

    Raises:
        OSError: It cannot be written.
    """
    sys.stdout.flush()


def is_stdout_gone(error: BaseException) -> bool:
    """Whether an error means that stdout cannot be written; if so, the rest of it is dropped."""
    chain: list[BaseException] = [error]
    # What prints, rich and typer, turns a broken pipe into a SystemExit of its own.
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    broken = any(isinstance(link, BrokenPipeError) for link in chain)
    try:
        sys.stdout.flush()
    except OSError:
        broken = True
    if broken:
        with open(os.devnull, "w") as devnull, contextlib.suppress(OSError, ValueError):
            os.dup2(devnull.fileno(), sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
    return broken
