"""What was measured of the lowerings: by it `--lowering auto` chooses.

`measured.json` beside this file holds the milliseconds of a step for every lowering, over steps, skip rates and who
skips, of two models per kind of routing. `benchmarks/lowerings.py` measures them, and writes the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.lowerings.record import Target

FILE = Path(__file__).with_name("measured.json")


@dataclasses.dataclass(frozen=True)
class MeasuredModel:
    """Times of one model's lowerings on one machine.

    Attributes:
        target: What ran them.
        machine: In words.
        onnxruntime: Its version.
        date: Of the measurement.
        dtype: Of weights and activations, "fp32".
        routing: What tokens skip.
        hidden_size: Of the model.
        cells: The steps, such as "decode 4, tokens, 0.25": kind and size of the step, who skips, and which share.
        milliseconds: Of each step, in the order of `cells`, by lowering.
    """

    target: Target
    machine: str
    onnxruntime: str
    date: str
    dtype: str
    routing: RoutingKind
    hidden_size: int
    cells: tuple[str, ...]
    milliseconds: Mapping[str, tuple[float, ...]]

    def worst_ratios(self, lowerings: Collection[str]) -> dict[str, float]:
        """How much longer than the fastest of some lowerings each takes, in the step where that is most.

        Args:
            lowerings: Names; those that were not measured are left out.

        Returns:
            By lowering, the best choice first; ratios, 1 or more.
        """
        times = {name: values for name, values in self.milliseconds.items() if name in lowerings}
        fastest = [min(step) for step in zip(*times.values(), strict=True)]
        worst = {
            name: max(time / least for time, least in zip(values, fastest, strict=True))
            for name, values in times.items()
        }
        return dict(sorted(worst.items(), key=lambda entry: entry[1]))


def nearest_model(target: Target, dtype: str, routing: RoutingKind, hidden_size: int | None) -> MeasuredModel | None:
    """The measured model that is most like another one; None where none of its kind was measured.

    Types of as many bits stand for each other: a step takes what its bytes and launches take.

    Args:
        target: What is to run it.
        dtype: Of its weights, as `--dtype` calls it.
        routing: What its tokens skip.
        hidden_size: Its own; None where it is not known, for the smallest.
    """
    of_kind = (each for each in read_measured() if (each.target, each.routing) == (target, routing))
    alike = [each for each in of_kind if BY_OPTION[each.dtype].itemsize == BY_OPTION[dtype].itemsize]
    wanted = math.log(hidden_size or 1)
    return min(alike, key=lambda each: abs(math.log(each.hidden_size) - wanted), default=None)


@functools.cache
def read_measured() -> tuple[MeasuredModel, ...]:
    """All that the file holds."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        MeasuredModel(
            **{
                **entry,
                "cells": tuple(entry["cells"]),
                "milliseconds": {name: tuple(values) for name, values in entry["milliseconds"].items()},
            }
        )
        for entry in entries
    )
