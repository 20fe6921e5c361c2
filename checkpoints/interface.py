"""The interface of a decoder graph: names of its inputs and outputs, and of what parity builds show besides.

The names are those of optimum and onnxruntime-genai; `write_indices` and `kv_lengths` belong to graphs with a static KV
cache, `past_active.{i}` and `present_active.{i}` to routed layers that leave no keys for skipped tokens. Whoever writes
or reads a graph's interface, in whatever runtime, takes the names from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from dlo_export.checkpoints.llama_layer import LAYER_NUMBER

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
WRITE_INDICES = "write_indices"
KV_LENGTHS = "kv_lengths"
LOGITS = "logits"
TOKEN_INPUTS = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)

STREAM_IN, STREAM_OUT = "part.stream_in", "part.stream_out"
"""Residual stream in front of a part of a decoder and behind it: of graphs that parity cuts."""

LEFT_PADDING = "left_padding"
"""Entry of a graph's metadata: "no" where its attention counts tokens and cannot tell padding in front of them."""

CachePart = Literal["key", "value"]
CACHE_PARTS: tuple[CachePart, CachePart] = ("key", "value")

_PAST = re.compile(rf"past_key_values\.{LAYER_NUMBER}\.(key|value)")
_PRESENT = re.compile(rf"present\.{LAYER_NUMBER}\.(key|value)")


class CacheName(NamedTuple):
    """What the name of a cache's input or output says."""

    layer: int
    part: CachePart


def past_name(layer: int | str, part: CachePart) -> str:
    """Graph input [batch, kv_heads, past, head_dim]; a `layer` such as "%d" or "{i}" makes a pattern."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int | str, part: CachePart) -> str:
    """Graph output [batch, kv_heads, past + sequence, head_dim]."""
    return f"present.{layer}.{part}"


def parse_past(name: str | None) -> CacheName | None:
    """What the name of a past input says; None if it is no such name."""
    return _parsed(_PAST, name)


def parse_present(name: str | None) -> CacheName | None:
    """What the name of a present output says; None if it is no such name."""
    return _parsed(_PRESENT, name)


def past_active_name(layer: int | str) -> str:
    """Graph input bool [batch, past]: which cached tokens were active in a routed layer."""
    return f"past_active.{layer}"


def present_active_name(layer: int | str) -> str:
    """Graph output bool [batch, past + sequence]."""
    return f"present_active.{layer}"


def is_state_input(name: str) -> bool:
    """Whether a graph input carries state from step to step."""
    return _layer_of(past_active_name(""), name) is not None or parse_past(name) is not None


def is_state_output(name: str) -> bool:
    """Whether a graph output carries state to the next step."""
    return _layer_of(present_active_name(""), name) is not None or parse_present(name) is not None


def is_interface_name(name: str) -> bool:
    """Whether a graph's interface uses this name, or may once layers are added to it or parity looks inside."""
    if name in {*TOKEN_INPUTS, WRITE_INDICES, KV_LENGTHS, LOGITS}:
        return True
    per_layer = (past_active_name, present_active_name, router_scores_name, force_active_name, hidden_name)
    parsed = (_layer_of(name_of(""), name) for name_of in per_layer)
    return parse_past(name) is not None or parse_present(name) is not None or any(i is not None for i in parsed)


def continuation_of(past: str) -> str:
    """The output that continues a state input.

    Raises:
        ValueError: It is no state input.
    """
    if (cache := parse_past(past)) is not None:
        return present_name(cache.layer, cache.part)
    layer = _layer_of(past_active_name(""), past)
    if layer is None:
        raise ValueError(f"{past}: is no state input")
    return present_active_name(layer)


def renumbered_name(name: str, numbers: Mapping[int, int]) -> str | None:
    """A state's name with its layer's new number, the old one where `numbers` has none; None for every other name."""
    for parse, name_of in ((parse_past, past_name), (parse_present, present_name)):
        if (cache := parse(name)) is not None:
            return name_of(numbers.get(cache.layer, cache.layer), cache.part)
    for active_name in (past_active_name, present_active_name):
        if (layer := _layer_of(active_name(""), name)) is not None:
            return active_name(numbers.get(layer, layer))
    return None


def router_scores_name(layer: int | str) -> str:
    """Output of parity builds, float32 [batch, sequence]."""
    return f"router_scores.{layer}"


def force_active_name(layer: int | str) -> str:
    """Input of parity builds, bool [batch, sequence]: decisions in place of the router's."""
    return f"force_active.{layer}"


def hidden_name(layer: int | str) -> str:
    """Output of parity builds, [batch, sequence, hidden]: the residual stream behind a layer."""
    return f"hidden.{layer}"


def layers_with(names: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Layers whose name occurs, ascending.

    Args:
        names: Of inputs or outputs.
        pattern: A name with "{i}" for the layer, as `router_scores_name("{i}")` gives it.
    """
    prefix, _, suffix = pattern.partition("{i}")
    found = (_layer_of(prefix, name, suffix) for name in names)
    return tuple(sorted(layer for layer in found if layer is not None))


def _parsed(pattern: re.Pattern[str], name: str | None) -> CacheName | None:
    match = pattern.fullmatch(name or "")
    return None if match is None else CacheName(int(match[1]), "key" if match[2] == "key" else "value")


def _layer_of(prefix: str, name: str, suffix: str = "") -> int | None:
    match = re.fullmatch(re.escape(prefix) + LAYER_NUMBER + re.escape(suffix), name)
    return None if match is None else int(match[1])
