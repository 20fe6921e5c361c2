"""What training refuses."""

from __future__ import annotations

from dlo_export.checkpoints.errors import InputError


class TrainingError(InputError):
    """The settings, the model or the run to continue do not allow training."""


class TrainingDataError(InputError):
    """The data cannot be read or leave nothing to learn."""


class TrainingDivergedError(InputError):
    """A loss or a gradient is no longer a finite number."""
