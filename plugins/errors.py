"""What the plugins raise."""

from __future__ import annotations


class PluginError(ValueError):
    """A plugin cannot be compiled, registered or launched as asked.

    Args:
        message: Who, what was found, what was expected.
        hint: What to do about it, one line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")
