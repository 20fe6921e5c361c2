"""Names of the training runs that others are compared with; what is made of a run is named after it."""

from __future__ import annotations

ORIGINAL, DEEPENED, DLO = "train-original", "train-deepened", "train-dlo"
SHIPPED = (ORIGINAL, DEEPENED, DLO)
"""Runs whose models are exported: the original and the dense deepened model beside the routed one."""
