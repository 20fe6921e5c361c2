"""What `--lowering auto` comes to, and what may be asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.lowerings.measured import nearest_model
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS, LoweringRecord, Target, Workload
from dlo_export.graph_passes.lowerings.registry import (
    NOTHING_ROUTED,
    asked_lowering,
    find_lowering,
    skipping_lowerings,
    suitable_lowerings,
)
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER


@dataclasses.dataclass(frozen=True)
class LoweredModel:
    """The model that a lowering is chosen for.

    Attributes:
        path: Of the source, for messages.
        routing: What tokens skip; None where it has no routers.
        hidden_size: None where it is unknown; it decides which measured model is like it.
        check: Raises an InputError where its graph cannot be had in a lowering.
        routers_removed: Whether it has none because the layers that had some are left out.
    """

    path: Path
    routing: RoutingKind | None
    hidden_size: int | None
    check: Callable[[LoweringRecord], None]
    routers_removed: bool = False


def choose_onnxruntime_lowering(
    choice: str,
    dtype: str,
    model: LoweredModel,
    *,
    provider: ProviderOption = "cpu",
    library_at_hand: bool = False,
    captured: bool = False,
) -> tuple[str, str]:
    """The lowering for one of ONNX Runtime's providers, and why.

    "auto" is the one whose worst case is the best, of those that were measured on a model like it
    (`graph_passes/lowerings/measured.py`); where none was, what the lowerings' records say of themselves.

    Args:
        choice: "auto" or the name of one.
        dtype: Of the graph; what the provider lacks for it is not chosen, but may be asked for.
        model: What is lowered.
        provider: What is to run it.
        library_at_hand: Whether the library of the dlo operators was given.
        captured: Whether a CUDA graph is to capture its steps, on a cache that is written in place.

    Raises:
        InputError: A lowering is asked for and nothing is routed, or not what it takes, or ONNX Runtime has none so
            called; or what is asked for, or needed, cannot be had.
    """
    target, runs_it = PROVIDER_TARGETS[provider], BY_PROVIDER[provider]
    path, routing = model.path, model.routing
    if routing is None:
        nothing_routed = find_lowering(NOTHING_ROUTED, target)
        check_nothing_asked(choice, path, routers_removed=model.routers_removed)
        return nothing_routed.name, nothing_routed.reason
    if choice != "auto":
        asked = asked_lowering(choice, target)
        if routing not in asked.routing:
            takes = " and ".join(asked.routing)
            choices = ", ".join(record.name for record in skipping_lowerings(target, routing))
            raise InputError(
                f"{path}: is of {routing} routing, --lowering {choice} takes {takes} routing", hint=f"choose {choices}"
            )
        model.check(asked)
        return asked.name, "asked for"
    if captured:
        capturable = [record for record in skipping_lowerings(target, routing) if record.capturable]
        if not capturable:
            raise InputError(
                f"{path}: is of {routing} routing, which no lowering makes skip at fixed shapes",
                hint="leave --static-cache out",
            )
        model.check(capturable[0])
        return capturable[0].name, capturable[0].reason
    preferred = _preferred(target, dtype, routing, model.hidden_size, library_at_hand=library_at_hand)
    possible = _possible(preferred, model)
    best = next(possible)
    # The best for this target, or the best of the others where the provider lacks a kernel that it needs.
    kind = BY_OPTION[dtype]
    gap = runs_it.why_not_run(kind, best[0].operators)
    nothing_runs = runs_it.why_not_run(kind) is not None  # of this type: it is for another runtime
    if gap is None or nothing_runs:
        return best[0].name, best[1]
    able = (choice for choice in possible if runs_it.why_not_run(kind, choice[0].operators) is None)
    second, reason = next(able, best)
    return second.name, f"{gap}, which {best[0].name} needs; {reason}"


def _possible(preferred: list[tuple[LoweringRecord, str]], model: LoweredModel) -> Iterator[tuple[LoweringRecord, str]]:
    """Those that the model's graph can be had in, asked one by one; the first says which ones were passed over."""
    refused = ""
    for record, reason in preferred:
        try:
            model.check(record)
        except InputError as err:
            refused += f"; {record.name} is not possible: {err.message.splitlines()[0]}"
        else:
            yield record, reason + refused
            refused = ""


def _preferred(
    target: Target, dtype: str, routing: RoutingKind, hidden_size: int | None, *, library_at_hand: bool
) -> list[tuple[LoweringRecord, str]]:
    """What `auto` may choose, best first, each with the reason."""
    own = {record.name: record for record in skipping_lowerings(target, routing)}
    # What needs a library that not everybody has is a choice of those who have given one.
    usable = [name for name, record in own.items() if library_at_hand or not record.domains]
    model = nearest_model(target, dtype, routing, hidden_size)
    ranked = {} if model is None else model.worst_ratios(usable)
    if model is not None and ranked:
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ranked.items())
        where = f"{model.machine}, ONNX Runtime {model.onnxruntime}, {model.date}, hidden size {model.hidden_size}"
        return [(own[name], f"longest step over the fastest lowering's: {shown} ({where})") for name in ranked]
    workload = Workload(routing=routing, plugins_at_hand=library_at_hand)
    suitable = dict.fromkeys((*suitable_lowerings(target, workload), *(own[name] for name in usable)))
    return [(record, record.reason) for record in suitable]


def check_nothing_asked(choice: str, path: Path, *, routers_removed: bool = False) -> None:
    """Refuses to lower a model without routers.

    Args:
        choice: "auto" or the name of a lowering.
        path: Of the source, for messages.
        routers_removed: Whether it has none because the layers that had some were left out.

    Raises:
        InputError: A lowering is asked for.
    """
    if choice == "auto":
        return
    if routers_removed:
        raise InputError(
            f"{path}: every routed layer passes everything on, so --remove-identity leaves --lowering {choice} nothing "
            "to lower",
            hint="leave one of the two options out",
        )
    raise InputError(
        f"{path}: has no routers, so --lowering {choice} has nothing to lower",
        hint="leave --lowering out, or give an adapter with routers (`dlo calibrate`)",
    )
