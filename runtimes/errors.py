"""What runtimes raises about models and arguments a user gave it."""

from __future__ import annotations

from typing import ClassVar


class RuntimeInputError(ValueError):
    """Base of this package's errors.

    Args:
        message: Who, what was found, what was expected.
        hint: What to do about it, one line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")


class ModelLoadError(RuntimeInputError):
    """A model is missing, damaged, or cannot run here."""


class ModelInterfaceError(RuntimeInputError):
    """A graph's inputs and outputs are not those of a decoder with a KV cache."""


class StepError(RuntimeInputError):
    """A step's arguments do not fit the model or what was fed before."""


class BackendUnavailableError(RuntimeInputError):
    """The machine lacks what an engine needs: a GPU, its driver, a package, or the version it was built with."""

    exit_code: ClassVar[int] = 4
