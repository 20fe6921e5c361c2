"""stdout and stderr that are closed, full, or whose reader has gone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class StdoutGoneError(BrokenPipeError):
    """stdout cannot be written to; a broken pipe for whoever prints, since all know how to take that."""


class _Stream:
    """A stream whose failures are handled in one place; in all else the stream it is made of.

    Args:
        stream: To write to.
        is_needed: False for messages: what nobody can read is dropped. True for results: whatever the system says is a
            StdoutGoneError.
    """

    def __init__(self, stream: TextIO, *, is_needed: bool) -> None:
        self._stream, self._is_needed = stream, is_needed

    def write(self, text: str) -> int:
        with self._handled():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._handled():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _handled(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            if self._is_needed:
                raise StdoutGoneError(err.errno, err.strerror) from err


def prepare_streams() -> None:
    """Makes both streams ones that can be written to without harm."""
    # A file opened while a standard stream is closed would get its number, and what libraries print would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        # Python has none where it was closed; this one is open for as long as the process lives.
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            # A name or a token that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, _Stream(stream, is_needed=name == "stdout")))


def is_stdout_gone(error: BaseException) -> bool:
    """Whether an error means that stdout cannot be written; if so, what is left of it is dropped."""
    link: BaseException | None = error
    # What prints, rich and typer, turns a broken pipe into a SystemExit of its own.
    while link is not None and not isinstance(link, StdoutGoneError):
        link = link.__cause__ or link.__context__
    if link is None:
        return False
    # Python writes what is left when it exits.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    return True
