"""What the plugins raise."""

from __future__ import annotations

from typing import ClassVar

from dlo_export.checkpoints.errors import InputError


class PluginError(InputError):
    """A plugin cannot be compiled, registered or launched as asked."""


class PluginLibraryError(PluginError):
    """The library that computes the `dlo` operators is missing, or not one that can be used here."""

    exit_code: ClassVar[int] = 4
