"""Checks of options that are numbers, which typer's ranges leave to us: NaN lies in every range."""

from __future__ import annotations

import math
import re

import typer

_UNITS = {"": 1, **{f"{prefix}b": 1000**power for power, prefix in enumerate(("", "k", "m", "g", "t"))}}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(("k", "m", "g", "t"), start=1)}
MAX_THREADS = 1024
MAX_COUNT = 2**31 - 1  # of tokens or sequences: what the sizes of tensors are counted in


def byte_count(option: str, text: str) -> int:
    """A size such as 2GB (of 1000³), 4GiB (of 1024³) or 500000 (bytes).

    Args:
        option: That it was given to, for messages.
        text: As it was given.

    Raises:
        InputError: It is none, or not above zero.
    """
    from dlo_export.checkpoints.errors import InputError  # noqa: PLC0415 - keeps `dlo --help` quick

    parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-z]*)", text.strip().lower(), re.ASCII)
    unit = None if parts is None else _UNITS.get(parts[2])
    count = 0 if parts is None or unit is None else int(float(parts[1]) * unit)
    if count < 1:
        raise InputError(
            f"{option} {text}: is no size, expected one byte or more",
            hint="give a number of at most 15 digits: bytes, or with kB, MB, GB, KiB, MiB or GiB",
        )
    return count


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
