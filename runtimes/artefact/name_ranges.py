"""Many inputs that differ only in their layer, as one: "past_key_values.{0..35}.key|value".

Seventy-two cache tensors of one shape are one fact; written out, they are most of a description.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dlo_export.checkpoints.interface import (
    CACHE_PARTS,
    past_active_name,
    past_name,
    present_active_name,
    present_name,
)
from dlo_export.checkpoints.llama_layer import MAX_LAYERS

_RANGE = re.compile(r"\{(0|[1-9]\d{0,5})\.\.(0|[1-9]\d{0,5})\}")
_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.|$)")
_BOTH_PARTS: Any = "|".join(CACHE_PARTS)  # both parts in one word
# How a layer's tensors are called that stand for one fact: as a pattern for any layer, and one by one.
_FAMILIES: tuple[tuple[Callable[[int | str], str], Callable[[int], list[str]]], ...] = (
    (
        lambda layer: past_name(layer, _BOTH_PARTS),
        lambda layer: [past_name(layer, part) for part in CACHE_PARTS],
    ),
    (
        lambda layer: present_name(layer, _BOTH_PARTS),
        lambda layer: [present_name(layer, part) for part in CACHE_PARTS],
    ),
    (past_active_name, lambda layer: [past_active_name(layer)]),
    (present_active_name, lambda layer: [present_active_name(layer)]),
)


def collapse(entries: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Writes runs of layers whose keys and values, or states, have equal entries as one entry; `expand` undoes it.

    Args:
        entries: Name and value, in order.
    """
    rest, collapsed = list(entries), []
    while rest:
        name, length = _run(rest)
        collapsed.append((name, rest[0][1]))
        rest = rest[length:]
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
    if not first <= last < MAX_LAYERS:
        raise ValueError(f"has the name {pattern}, expected a range of at most {MAX_LAYERS} layers")
    for pattern_of, names_of in _FAMILIES:
        if pattern == pattern_of(match[0]):
            return [name for layer in range(first, last + 1) for name in names_of(layer)]
    known = " or ".join(pattern_of("{a..b}") for pattern_of, _ in _FAMILIES)
    raise ValueError(f"has the name {pattern}, expected {known}")


def _run(entries: Sequence[tuple[str, Any]]) -> tuple[str, int]:
    """Name and length of the longest run from the first entry on: layer after layer, all with one value."""
    (first, value), found = entries[0], _NUMBER.search(entries[0][0])
    for pattern_of, names_of in _FAMILIES if found is not None else ():
        start = int(found[1])  # type: ignore[index]  # there are none without it
        step, layers = len(names_of(start)), 0
        wanted = [(name, value) for name in names_of(start)]
        while list(entries[layers * step : (layers + 1) * step]) == wanted:
            layers += 1
            wanted = [(name, value) for name in names_of(start + layers)]
        if layers * step > 1:
            return pattern_of(f"{{{start}..{start + layers - 1}}}"), layers * step
    return first, 1
