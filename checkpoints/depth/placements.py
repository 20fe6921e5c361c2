"""Where a deepened model gets its new layers, and which original each of them derives from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dlo_export.checkpoints.adapter.adapter import InjectedLayer
from dlo_export.checkpoints.depth.layer_init import canonical_init
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.llama_layer import MAX_LAYERS

TLI_SOURCES = ("prev", "next", "mean", "slerp")
_MIXED_INITS = {
    ("mean", "copy"): "linear",
    ("mean", "zero_out"): "linear_zero_out",
    ("slerp", "copy"): "slerp",
    ("slerp", "zero_out"): "slerp_zero_out",
}


class ExpansionError(InputError):
    """A model cannot be deepened the way it was asked for."""


@dataclass(frozen=True)
class ExpansionPlan:
    """New layers among the originals, which keep their order.

    Attributes:
        num_base_layers: Layers of the model to deepen.
        injected_layers: The new layers, by rising position in the deepened model.
    """

    num_base_layers: int
    injected_layers: tuple[InjectedLayer, ...]

    @property
    def num_layers(self) -> int:
        """Layers of the deepened model."""
        return self.num_base_layers + len(self.injected_layers)

    @property
    def original_positions(self) -> tuple[int, ...]:
        """For every layer of the base model, its index in the deepened one."""
        injected = {layer.position for layer in self.injected_layers}
        return tuple(position for position in range(self.num_layers) if position not in injected)


def placements(method: str, num_layers: int, **parameters: Any) -> ExpansionPlan:
    """Plans the new layers of a model.

    Args:
        method: ``tli``, ``interleave``, ``llama-pro`` or ``dus``; or a preset of `PRESETS`, whose settings the
            parameters override.
        num_layers: Layers of the model to deepen.
        parameters: Of the method, see `tli`, `interleave`, `llama_pro` and `dus`.

    Raises:
        ExpansionError: Unknown method or parameter, or the numbers do not work out.
        LayerInitError: Unknown init.
    """
    if method in PRESETS:
        base, settings = PRESETS[method]
        return placements(base, num_layers, **{**settings, **parameters})
    if method not in METHODS:
        choices = ", ".join((*METHODS, *PRESETS))
        raise ExpansionError(
            f"expansion: found method {method!r}, expected one of {choices}", hint="DLO's is interleave"
        )
    if num_layers < 1:
        raise ExpansionError(
            f"expansion: the model has {num_layers} layers, expected at least 1", hint="check the config"
        )
    _check_parameters(method, parameters)
    return METHODS[method](num_layers, **parameters)


def tli(num_layers: int, *, every: int, offset: int = 0, source: str = "prev", init: str = "zero_out") -> ExpansionPlan:
    """Transformer Layer Injection (arXiv 2410.11654): one new layer after every K originals.

    Args:
        num_layers: L, layers of the model to deepen; the deeper one has L + floor((L - offset) / every).
        every: K.
        offset: Originals to pass over before counting.
        source: What the new layer is made of: the original before it, the one after it, their mean or their slerp. At
            the end of the model there is none after it: the one before it is taken.
        init: ``zero_out`` keeps the function; ``copy``; with source prev or next, any init.

    Raises:
        ExpansionError: Nothing or too much would be injected; or the source is unknown, or does not go with the init.
        LayerInitError: Unknown init.
    """
    if every < 1 or offset < 0 or offset + every > num_layers:
        raise ExpansionError(
            f"expansion tli: every {every} with offset {offset} injects nothing into {num_layers} layers, expected "
            f"every >= 1, offset >= 0 and offset + every <= {num_layers}",
            hint="every 5 of 30 layers makes 36",
        )
    if source not in TLI_SOURCES:
        raise ExpansionError(
            f"expansion tli: found source {source!r}, expected one of {', '.join(TLI_SOURCES)}",
            hint="the usual is prev",
        )
    name = canonical_init(init)
    if source in ("mean", "slerp") and (source, name) not in _MIXED_INITS:
        raise ExpansionError(
            f"expansion tli: source {source} goes with init copy or zero_out, found {init!r}",
            hint="the other inits say themselves which layers they mix; use source prev",
        )
    _check_depth("tli", num_layers, (num_layers - offset) // every)
    layers: list[InjectedLayer] = []
    for last in range(offset + every - 1, num_layers, every):
        position, following = last + 1 + len(layers), last + 1
        if source == "prev" or following == num_layers:
            layers.append(InjectedLayer(position, last, name))
        else:
            # A mixture of `source` and the layer before it is a mixture of the neighbours if source is the next one.
            layers.append(InjectedLayer(position, following, _MIXED_INITS.get((source, name), name)))
    return ExpansionPlan(num_layers, tuple(layers))


def interleave(num_layers: int, *, target_layers: int, init: str = "zero_out") -> ExpansionPlan:
    """DLO's rule (arXiv 2407.11030): after every floor(L / (L' - L)) originals a new layer made from the last of them.

    Args:
        num_layers: L, layers of the model to deepen.
        target_layers: L'; 32 to 40 puts the new layers at 4, 9, …, 39.
        init: Any init.

    Raises:
        ExpansionError: Not from one more layer to twice as many.
        LayerInitError: Unknown init.
    """
    if not num_layers < target_layers <= 2 * num_layers:
        raise ExpansionError(
            f"expansion interleave: target_layers {target_layers} of {num_layers} layers, expected from "
            f"{num_layers + 1} to {2 * num_layers}",
            hint="this method adds at most one new layer per original; llama-pro adds several with per_group",
        )
    return _grouped(num_layers, target_layers - num_layers, 1, init, "interleave")


def llama_pro(num_layers: int, *, groups: int, per_group: int = 1) -> ExpansionPlan:
    """LLaMA-Pro's rule (arXiv 2401.02415): P zero_out copies of the last original after each group of originals.

    Args:
        num_layers: Layers of the model to deepen.
        groups: Groups that the originals are cut into.
        per_group: P.

    Raises:
        ExpansionError: More groups than layers, or too many new layers.
    """
    return _grouped(num_layers, groups, per_group, "zero_out", "llama-pro")


def dus(num_layers: int, *, overlap: int) -> ExpansionPlan:
    """SOLAR's depth up-scaling (arXiv 2312.15166): layers [0, L - m) and then [m, L), one seam, 2(L - m) layers.

    The second run of layers m … L - m - 1 counts as injected copies; the function is not preserved.

    Args:
        num_layers: L, layers of the model to deepen.
        overlap: m, layers left out at the end of the first and at the start of the second half.

    Raises:
        ExpansionError: No layer would be repeated, or the overlap is below 0, or the model would be too deep.
    """
    if overlap < 0 or 2 * overlap >= num_layers:
        raise ExpansionError(
            f"expansion dus: overlap {overlap} of {num_layers} layers, expected from 0 to {(num_layers - 1) // 2}",
            hint="SOLAR took 8 of 32",
        )
    _check_depth("dus", num_layers, num_layers - 2 * overlap)
    seam = num_layers - overlap
    copied = range(overlap, seam)
    layers = tuple(InjectedLayer(seam + index, source, "copy") for index, source in enumerate(copied))
    return ExpansionPlan(num_layers, layers)


def _grouped(num_layers: int, groups: int, per_group: int, init: str, method: str) -> ExpansionPlan:
    if per_group < 1 or not 1 <= groups <= num_layers:
        raise ExpansionError(
            f"expansion {method}: {groups} groups of {per_group} new layers among {num_layers} originals, expected "
            f"1 to {num_layers} groups of at least 1",
            hint="this method can at most add one group per original layer",
        )
    _check_depth(method, num_layers, groups * per_group)
    split = num_layers // groups
    name = canonical_init(init)
    layers: list[InjectedLayer] = []
    for group in range(groups):
        last = (group + 1) * split - 1
        for _ in range(per_group):
            layers.append(InjectedLayer(last + 1 + len(layers), last, name))
    return ExpansionPlan(num_layers, tuple(layers))


def _check_depth(method: str, num_layers: int, added: int) -> None:
    if num_layers + added > MAX_LAYERS:
        raise ExpansionError(
            f"expansion {method}: {added} new layers among {num_layers} originals make {num_layers + added} layers, "
            f"expected at most {MAX_LAYERS}",
            hint="published models have grown by a quarter to a half",
        )


def _check_parameters(method: str, given: Mapping[str, Any]) -> None:
    known = inspect.signature(METHODS[method]).parameters.values()
    own = [parameter for parameter in known if parameter.kind is parameter.KEYWORD_ONLY]
    names = [parameter.name for parameter in own]
    missing = [
        parameter.name for parameter in own if parameter.default is parameter.empty and parameter.name not in given
    ]
    problems = [f"needs {', '.join(missing)}"] if missing else []
    if unknown := [name for name in given if name not in names]:
        problems.append(f"has no {', '.join(unknown)}")
    if problems:
        raise ExpansionError(
            f"expansion {method}: {', and '.join(problems)}", hint=f"its parameters are {', '.join(names)}"
        )


METHODS: dict[str, Callable[..., ExpansionPlan]] = {
    "tli": tli,
    "interleave": interleave,
    "llama-pro": llama_pro,
    "dus": dus,
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # Which init the TLI paper used is not public: both readings have a name.
    "tli-copy": ("tli", {"init": "copy"}),
    "tli-zero-out": ("tli", {"init": "zero_out"}),
}
