"""Router thresholds: by layer, the score a token must exceed to be active.

`router_thresholds` is an object of layers (in decimal, as JSON's keys are) and scores, in a checkpoint's config.json,
an adapter's and an artefact's description. A routed layer that it does not name has the DLO authors' one half.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dlo_export.checkpoints.llama_layer import LAYER_NUMBER

KEY = "router_thresholds"
ONE_HALF = 0.5
"""The threshold of the DLO authors' code (arXiv 2407.11030), and of every layer that has none of its own."""

_DIGITS = 60  # that a logit is computed in; a float32 has nine


def float32_threshold(value: float) -> float:
    """The float32 a threshold stands for: scores are compared with it in float32, whatever computes them."""
    return float(np.float32(value))


def logit_threshold(threshold: float) -> float:
    """The logit that stands for a threshold: the largest float32 whose sigmoid, rounded to float32, is not above it.

    So "logit > it" says the same as "score > threshold", of a correctly rounded sigmoid, for every float32. For one
    half it is 2**-23, not 0: the sigmoids of what lies between round to one half.

    Args:
        threshold: A float32 above 0 and below 1.

    Raises:
        ValueError: It is none.
    """
    at = np.float32(threshold)
    if not 0 < threshold < 1 or float(at) != threshold:
        raise ValueError(f"threshold {threshold!r} is no float32 above 0 and below 1")
    with decimal.localcontext(prec=_DIGITS):
        # A score rounds to more than the threshold from halfway to the next float32 on. No logit's is just halfway: a
        # sigmoid of a number other than 0 is transcendental, and that of 0 a float32.
        halfway = (decimal.Decimal(float(at)) + decimal.Decimal(float(np.nextafter(at, np.float32(1))))) / 2
        exact = (halfway / (1 - halfway)).ln()
        found = np.float32(float(exact))  # one of the two float32 that it lies between
        if decimal.Decimal(float(found)) >= exact:
            found = np.nextafter(found, np.float32(-np.inf))
    return float(found)


def threshold_problems(entries: Any, routed_layers: Collection[int] | None) -> list[str]:
    """What is wrong with a `router_thresholds` as it was read from JSON.

    Args:
        entries: As read; None where it was left out.
        routed_layers: Which may have one; None where the layers themselves were not understood, so that only the form
            is checked.
    """
    if entries is None:
        return []
    if not isinstance(entries, dict):
        return [f"{KEY} is {entries!r}, expected an object of layers and scores such as {{'3': 0.4}}"]
    problems = []
    for layer, threshold in entries.items():
        place = f"{KEY}.{layer}"
        if not isinstance(layer, str) or not re.fullmatch(LAYER_NUMBER, layer):
            problems.append(f"{place} names no layer, expected its number")
        elif routed_layers is not None and int(layer) not in routed_layers:
            problems.append(f"{place} names a layer that is not routed")
        if not _is_score(threshold):
            problems.append(f"{place} is {threshold!r}, expected a score above 0 and below 1")
    return problems


def read_thresholds(entries: Mapping[str, float] | None) -> dict[int, float]:
    """A `router_thresholds` without problems, by rising layer, in float32; a threshold of one half is left out."""
    values = {int(layer): float32_threshold(threshold) for layer, threshold in (entries or {}).items()}
    return {layer: values[layer] for layer in sorted(values) if values[layer] != ONE_HALF}


def thresholds_json(thresholds: Mapping[int, float]) -> dict[str, float]:
    """The inverse of `read_thresholds`."""
    return {str(layer): float(thresholds[layer]) for layer in sorted(thresholds)}


def replaced_thresholds(config: Mapping[str, Any], thresholds: Mapping[int, float]) -> dict[str, Any]:
    """What a model that had a config.json says of its thresholds once they are these.

    Returns:
        The key and its value; null, which is as good as left out, where a value is to go; nothing where there is none.
    """
    if thresholds:
        return {KEY: thresholds_json(thresholds)}
    return {KEY: None} if config.get(KEY) else {}


def _is_score(value: Any) -> bool:
    # In float32, 1e-50 is 0 and 0.99999999999 is 1.
    return type(value) in (int, float) and 0 < value < 1 and 0 < float32_threshold(value) < 1
