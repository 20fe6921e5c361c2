"""Checks of options that are numbers, which typer's ranges leave to us: NaN lies in every range."""

from __future__ import annotations

import math

import typer

MAX_THREADS = 1024
MAX_COUNT = 2**31 - 1  # of tokens or sequences: what the sizes of tensors are counted in


def finite(value: float | None) -> float | None:
    """An option's value, if it is a number.

    Raises:
        typer.BadParameter: It is infinite or NaN.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def positive(value: float | None) -> float | None:
    """An option's value, if it is above zero.

    Raises:
        typer.BadParameter: It is not, or is infinite or NaN.
    """
    if finite(value) is not None and value is not None and value <= 0:
        raise typer.BadParameter(f"{value} is not above zero")
    return value
