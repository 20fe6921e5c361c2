"""What evaluation raises about texts, requests and settings."""

from __future__ import annotations

from dlo_export.runtimes.errors import RuntimeInputError


class EvaluationError(RuntimeInputError):
    """There is nothing to measure, or it cannot be measured with this model."""
