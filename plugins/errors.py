"""What the plugins raise."""

from __future__ import annotations

from dlo_export.checkpoints.errors import InputError


class PluginError(InputError):
    """A plugin cannot be compiled, registered or launched as asked."""
