"""Errors a user can cause, each with the exit code the command line ends with."""

from __future__ import annotations

from typing import ClassVar


class DloError(Exception):
    """Base of the errors that are reported without a traceback.

    Args:
        message: Who, what was found, what was expected.
        hint: What to do about it, one line.

    Attributes:
        message: As given; `str` of the error is both.
        hint: As given.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
        self.message = message
        self.hint = hint


class InputError(DloError, ValueError):
    """Bad arguments or input."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint is missing, truncated, corrupt, or not a Llama this version exports."""


class EngineBuildError(DloError):
    """A TensorRT engine build failed."""

    exit_code = 3


class MachineError(DloError):
    """The machine lacks something: a backend, a package, disk space."""

    exit_code = 4
