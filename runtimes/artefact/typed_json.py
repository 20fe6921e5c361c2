"""Frozen dataclasses as JSON and back: what a field may hold is said once, by its annotation.

Reading checks everything and collects what is wrong, each problem with its field's path ("engines[0].build.bytes").
Known annotations: str, bool, int, float, `Path` (a file inside the folder of the JSON), Literal, X | None and other
unions of scalars, tuple[X, ...] and tuples of fixed length, Mapping[str, X] and Mapping[int, X], dataclasses, and
`Annotated` with a `Rule` (more than the type says) or a `Form` (another form in the file).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 2**63 - 1  # what readers in other languages have an integer type for
_SHOWN = 60  # characters of a wrong value in a message
_SCALARS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "null"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What must hold of a value beyond its type.

    Attributes:
        words: What is expected, for messages.
        holds: Of a value of the right type.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Form:
    """Another form of a value in the file, between its JSON and the JSON of the annotated type.

    Attributes:
        write: Of the type's JSON; returns what the file holds.
        read: The inverse; gets any JSON, leaves what it does not know, raises ValueError for what cannot be read.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


class JsonProblemsError(ValueError):
    """What is wrong with JSON values.

    Attributes:
        problems: One line each, beginning with the field's path.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def to_json(value: Any, folder: Path) -> dict[str, Any]:
    """A dataclass as a JSON object.

    Args:
        value: The dataclass.
        folder: Of the file to write: paths are given relative to it.
    """
    written = _written(type(value), value, folder)
    assert isinstance(written, dict), "a dataclass is an object"
    return written


def from_json(kind: type[T], values: Any, folder: Path) -> T:
    """The inverse of `to_json`; keys that no field has are left out.

    Args:
        kind: The dataclass.
        values: Any JSON.
        folder: Of the file that was read.

    Raises:
        JsonProblemsError: With everything that is missing or wrong.
    """
    reader = _Reader(folder)
    made: T = reader.read(kind, values, "")
    if reader.problems:
        raise JsonProblemsError(reader.problems)
    return made


def _written(kind: Any, value: Any, folder: Path) -> Any:
    kind, _, form = _taken_apart(kind)
    written: Any
    found: Any = type(value)
    if _is_object(value):
        written = {name: _written(hint, getattr(value, name), folder) for name, hint in _fields(found)}
    elif isinstance(value, Path):
        written = Path(os.path.relpath(value, folder)).as_posix()
    elif isinstance(value, Mapping):
        written = {str(key): _written(_arguments(kind)[-1], item, folder) for key, item in value.items()}
    elif isinstance(value, tuple):
        inner = _arguments(kind)
        kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is ... else inner
        written = [_written(item_kind, item, folder) for item_kind, item in zip(kinds, value, strict=True)]
    else:
        written = value
    return written if form is None else form.write(written)


class _Reader:
    """Reads values of annotated types; a wrong one is noted and read as None, which nobody gets to see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.problems = folder, list[str]()

    def read(self, kind: Any, value: Any, where: str) -> Any:
        kind, rules, form = _taken_apart(kind)
        if form is not None:
            try:
                value = form.read(value)
            except ValueError as err:
                return self._wrong(where, str(err))
        before = len(self.problems)
        made = self._of_type(kind, value, where)
        if len(self.problems) == before:
            for rule in rules:
                if made is not None and not rule.holds(made):
                    return self._wrong(where, f"is {_shown(value)}, expected {rule.words}")
        return made

    def _of_type(self, kind: Any, value: Any, where: str) -> Any:
        readers = {
            Union: self._one_of,
            types.UnionType: self._one_of,
            Literal: self._choice,
            tuple: self._list,
            Mapping: self._mapping,
        }
        origin = get_origin(kind)
        if origin in readers:
            return readers[origin](get_args(kind), value, where)
        if dataclasses.is_dataclass(kind):
            return self._object(kind, value, where)
        if kind is Path:
            return self._path(value, where)
        if _is_scalar(kind, value):
            return float(value) if kind is float else value
        return self._wrong(where, f"is {_shown(value)}, expected {_SCALARS[kind]}")

    def _choice(self, choices: tuple[str, ...], value: Any, where: str) -> Any:
        if isinstance(value, str) and value in choices:
            return value
        return self._wrong(where, f"is {_shown(value)}, expected one of {', '.join(choices)}")

    def _one_of(self, kinds: tuple[Any, ...], value: Any, where: str) -> Any:
        if value is None and types.NoneType in kinds:
            return None
        others = [kind for kind in kinds if kind is not types.NoneType]
        if len(others) == 1:  # its own message says more
            return self.read(others[0], value, where)
        if any(_is_scalar(kind, value) for kind in others):
            return value
        return self._wrong(where, f"is {_shown(value)}, expected {' or '.join(_SCALARS[kind] for kind in kinds)}")

    def _object(self, kind: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            return self._wrong(where, f"is {_shown(value)}, expected an object")
        before, made = len(self.problems), {}
        for name, hint in _fields(kind):
            path = f"{where}.{name}" if where else name
            if name in value:
                made[name] = self.read(hint, value[name], path)
            else:
                self._wrong(path, "is missing")
        return kind(**made) if len(self.problems) == before else None

    def _list(self, kinds: tuple[Any, ...], value: Any, where: str) -> Any:
        if not isinstance(value, list):
            return self._wrong(where, f"is {_shown(value)}, expected a list")
        if len(kinds) == 2 and kinds[1] is ...:
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            return self._wrong(where, f"has {len(value)} entries, expected {len(kinds)}")
        return tuple(
            self.read(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )

    def _mapping(self, kinds: tuple[Any, Any], value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            return self._wrong(where, f"is {_shown(value)}, expected an object")
        made = {}
        for key, item in value.items():
            if kinds[0] is int and not (key.isascii() and key.isdigit() and len(key) <= len(str(_LARGEST)) - 1):
                self._wrong(where, f"has the key {_shown(key)}, expected whole numbers")
            else:
                made[kinds[0](key)] = self.read(kinds[1], item, f"{where}.{key}" if where else key)
        return made

    def _path(self, value: Any, where: str) -> Any:
        pure = PurePosixPath(value) if isinstance(value, str) and value and "\0" not in value else None
        if pure is None:
            return self._wrong(where, f"is {_shown(value)}, expected the name of a file")
        if pure.is_absolute() or ".." in pure.parts:
            return self._wrong(where, f"is {_shown(value)}, expected a file inside the folder")
        return self.folder / pure

    def _wrong(self, where: str, text: str) -> None:
        self.problems.append(f"{where or 'the file'} {text}")


def _is_object(value: Any) -> bool:
    return dataclasses.is_dataclass(value)


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is float:
        return (type(value) is float and math.isfinite(value)) or _is_scalar(int, value)
    return type(value) is kind and (kind is not int or abs(value) <= _LARGEST)


def _taken_apart(kind: Any) -> tuple[Any, list[Rule], Form | None]:
    """A type without its annotations, and those."""
    if get_origin(kind) is not Annotated:
        return kind, [], None
    inner, *notes = get_args(kind)
    forms = [note for note in notes if isinstance(note, Form)]
    return inner, [note for note in notes if isinstance(note, Rule)], forms[0] if forms else None


def _arguments(kind: Any) -> tuple[Any, ...]:
    """Of a generic type, or of the one in "X | None"."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(inner for inner in get_args(kind) if inner is not types.NoneType)
    return get_args(kind)


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    """A dataclass's fields with their annotations, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
