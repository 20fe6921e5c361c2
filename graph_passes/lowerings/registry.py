"""The lowerings there are. A new one is a line here; everybody else asks this module.

Names are known without importing the passes, so that a command line can list its choices in no time.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dlo_export.checkpoints.errors import InputError

if TYPE_CHECKING:
    from dlo_export.checkpoints.model_types import RoutingKind
    from dlo_export.graph_passes.lowerings.record import LoweringRecord, Target, Workload

# By name, the modules beside this one that hold its records (`RECORD`), one per target or group of targets. Where
# `auto` finds several that suit, and none of them was measured (`measured.py`), the first one is its choice.
_MODULES: dict[str, tuple[str, ...]] = {
    "plugin": ("lower_skip_to_plugin", "plugin_on_cpu"),
    "if": ("lower_skip_to_if", "if_on_cuda", "if_on_tensorrt"),
    "compact": ("lower_skip_to_compaction", "compaction_on_cuda", "lower_skip_to_topk"),
    "masked": ("masked",),
}
EXTRA_RECORDS: list[LoweringRecord] = []
"""Lowerings of others; `auto` chooses none where others were measured."""

NOTHING_ROUTED = "none"
"""Stands in a lowering's place where nothing is routed."""


def lowering_names(target: Target | None = None) -> tuple[str, ...]:
    """What can be asked for by name; for one target, which reads the records, or in all."""
    if target is not None:
        return tuple(record.name for record in lowering_records() if target in record.targets)
    return tuple(dict.fromkeys((*(record.name for record in EXTRA_RECORDS), *_MODULES)))


def lowering_records() -> Iterator[LoweringRecord]:
    """All of them, in the order in which `auto` prefers them."""
    yield from EXTRA_RECORDS
    for module in (module for modules in _MODULES.values() for module in modules):
        yield importlib.import_module(f"{__package__}.{module}").RECORD


def find_lowering(name: str, target: Target) -> LoweringRecord:
    """The lowering of a name for a target, as a graph's description has it.

    Raises:
        InputError: There is none, with those there are.
    """
    if name == NOTHING_ROUTED:
        from dlo_export.graph_passes.lowerings.masked import DENSE  # noqa: PLC0415 - see above: names come first

        return DENSE
    return asked_lowering(name, target)


def asked_lowering(name: str, target: Target) -> LoweringRecord:
    """The lowering of a name that somebody asks a routed graph to get.

    Raises:
        InputError: There is none, with those there are.
    """
    served = {record.name: record for record in lowering_records() if target in record.targets}
    if name in served:
        return served[name]
    others = [record for record in lowering_records() if record.name == name]
    targets = ", ".join(dict.fromkeys(target for record in others for target in record.targets))
    raise InputError(
        f"--lowering {name}: " + (f"is for {targets}, not for {target}" if others else "is unknown"),
        hint=f"{target} has {', '.join(served)}" + ("; add --trt for TensorRT's" if "tensorrt" in targets else ""),
    )


def skipping_lowerings(target: Target, routing: RoutingKind = "mlp") -> list[LoweringRecord]:
    """Those of a target that save work where tokens skip this."""
    found = (record for record in lowering_records() if target in record.targets and routing in record.routing)
    return [record for record in found if record.make_pass is not None]


def lowerings_without_operators(target: Target, routing: RoutingKind = "mlp") -> list[str]:
    """Names of those that save work in a target's own operators alone."""
    return [record.name for record in skipping_lowerings(target, routing) if not record.domains]


def suitable_lowerings(target: Target, workload: Workload) -> list[LoweringRecord]:
    """What `auto` tries for a routed graph, best first."""
    found = (record for record in lowering_records() if target in record.targets and record.suits(workload))
    return [record for record in found if workload.routing in record.routing]
