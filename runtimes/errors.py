"""What runtimes raises about models and arguments a user gave it."""

from __future__ import annotations

from typing import ClassVar

from dlo_export.checkpoints.errors import InputError


class RuntimeInputError(InputError):
    """Base of this package's errors."""


class ModelLoadError(RuntimeInputError):
    """A model is missing, damaged, or cannot run here."""


class ModelInterfaceError(RuntimeInputError):
    """A graph's inputs and outputs are not those of a decoder with a KV cache."""


class StepError(RuntimeInputError):
    """A step's arguments do not fit the model or what was fed before."""


class BackendUnavailableError(RuntimeInputError):
    """The machine lacks what a model needs: memory, a GPU, its driver, a package, or the version it was built with."""

    exit_code: ClassVar[int] = 4


class ProviderUnavailableError(BackendUnavailableError):
    """ONNX Runtime has not the execution provider that was asked for, or it does not start."""
