"""Typed reads of a JSON object that collect what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

# Far above any count in a model; larger ones would overflow what they are used for.
MAX_INTEGER = 2**31 - 1
LARGEST_NUMBER = (2 - 2.0**-23) * 2.0**127  # of float32
SMALLEST_POSITIVE = 2.0**-126  # of float32 with all of its bits: its reciprocal is a number too


class JsonFields:
    """Reads fields one by one; an invalid field is noted as a problem and read as a stand-in.

    A null means "not given", as it does to transformers.

    Args:
        values: The object.
        prefix: Of the names in problems.

    Attributes:
        problems: What is wrong so far, one line each, shared with nested objects.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.problems: list[str] = []
        self._prefix = prefix
        self._invalid: set[str] = set()

    def nested(self, name: str, values: Mapping[str, Any]) -> JsonFields:
        """The fields of an object that is itself a field."""
        fields = JsonFields(values, f"{self._prefix}{name}.")
        fields.problems = self.problems
        return fields

    def problem(self, name: str, text: str) -> None:
        """Notes that a field is wrong."""
        self.problems.append(f"{self._prefix}{name} {text}")
        self._invalid.add(name)

    def are_valid(self, *names: str) -> bool:
        """Whether no problem with these fields was noted, so that their values mean something."""
        return self._invalid.isdisjoint(names)

    def integer(self, name: str, default: int | None = None, largest: int = MAX_INTEGER) -> int:
        """An integer from 1 to `largest`."""
        expected = "a positive integer" if largest == MAX_INTEGER else f"an integer from 1 to {largest}"
        return int(self._checked(name, default, lambda v: _is_int(v) and 0 < v <= largest, expected, 1))

    def positive_number(self, name: str, default: float | None = None) -> float:
        """A number above zero, in float32 too."""
        value = self.values.get(name)
        is_tiny = is_number(value) and value > 0
        expected = f"{SMALLEST_POSITIVE:.2g} at least" if is_tiny else "a positive number"
        return float(self._checked(name, default, is_positive, expected, 1.0))

    def number(self, name: str, default: float | None = None, least: float = -math.inf) -> float:
        """Any finite number from `least` on."""
        expected = "a finite number" if least == -math.inf else f"a finite number from {least} on"
        return float(self._checked(name, default, lambda v: is_number(v) and v >= least, expected, 1.0))

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        return bool(self._checked(name, default, lambda v: isinstance(v, bool), "true or false", False))

    def token(self, name: str, default: int | None) -> int | None:
        """A token id, None for null and for -1, which is how Meta's conversion scripts write "none"."""
        value = self.values.get(name, default)
        if value is None or value == -1:
            return None
        if not _is_token(value):
            self.problem(name, f"is {value!r}, expected a token id")
            return None
        return int(value)

    def tokens(self, name: str, default: int) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self.values.get(name, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(_is_token, ids)):
            self.problem(name, f"is {value!r}, expected a token id or a list of them")
            return ()
        return tuple(ids)

    def _checked(self, name: str, default: Any, valid: Callable[[Any], bool], expected: str, stand_in: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if value is not None and valid(value):
            return value
        found = "is missing" if value is None else f"is {value!r}"
        self.problem(name, f"{found}, expected {expected}")
        return stand_in


def _is_int(value: object) -> bool:
    return type(value) is int and abs(value) <= MAX_INTEGER


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number, and one that float32 holds: in a model's arithmetic it will be that."""
    return _is_int(value) or (isinstance(value, float) and abs(value) <= LARGEST_NUMBER)


def is_positive(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number above zero that float32 does not round to zero: models divide by it."""
    return is_number(value) and value >= SMALLEST_POSITIVE
