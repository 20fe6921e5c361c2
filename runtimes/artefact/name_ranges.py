"""Many inputs that differ only in their layer, as one: "past_key_values.{0..35}.key|value".

Seventy-two cache tensors of one shape are one fact; written out, they are most of a description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dlo_export.checkpoints.interface import CACHE_PARTS, parse_past, parse_present, past_name, present_name

_RANGE = re.compile(r"\{(0|[1-9]\d{0,5})\.\.(0|[1-9]\d{0,5})\}")
_MOST_LAYERS = 10_000
_BOTH_PARTS = "|".join(CACHE_PARTS)


def collapse(entries: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Writes runs of layers whose keys and values have equal entries as one entry; `expand` undoes it.

    Args:
        entries: Name and value, in order.
    """
    rest, collapsed = list(entries), []
    while rest:
        length = _run_length(rest)
        name, value = rest[0]
        collapsed.append((_range_name(name, length), value) if length else (name, value))
        rest = rest[max(length, 1) :]
    return collapsed


def expand(entries: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The inverse of `collapse`.

    Raises:
        ValueError: A range is not one, or a name occurs twice.
    """
    expanded: dict[str, Any] = {}
    for pattern, value in entries:
        for name in _names(pattern):
            if name in expanded:
                raise ValueError(f"names {name} twice")
            expanded[name] = value
    return list(expanded.items())


def _names(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not first <= last < _MOST_LAYERS:
        raise ValueError(f"has the name {pattern}, expected a range of at most {_MOST_LAYERS} layers")
    for name in (past_name, present_name):
        if pattern == name(match[0], _BOTH_PARTS):  # type: ignore[arg-type]  # both parts in one word
            return [name(layer, part) for layer in range(first, last + 1) for part in CACHE_PARTS]
    raise ValueError(f"has the name {pattern}, expected {past_name('{a..b}', _BOTH_PARTS)} or its present")  # type: ignore[arg-type]


def _run_length(entries: Sequence[tuple[str, Any]]) -> int:
    """How many entries from the first on are keys and values of one layer after the other, all with one value."""
    first, value = entries[0]
    name = past_name if parse_past(first) else present_name
    start = parse_past(first) or parse_present(first)
    if start is None:
        return 0
    length = 0
    for index, (found, other) in enumerate(entries):
        layer, part = start.layer + index // 2, CACHE_PARTS[index % 2]
        if found != name(layer, part) or other != value:
            break
        length = index + 1
    return length - length % 2  # whole layers only


def _range_name(first: str, length: int) -> str:
    cache = parse_past(first) or parse_present(first)
    assert cache is not None, "only names of caches run"
    layers = f"{{{cache.layer}..{cache.layer + length // 2 - 1}}}"
    return (past_name if parse_past(first) else present_name)(layers, _BOTH_PARTS)  # type: ignore[arg-type]
