"""A source without layers that pass everything on: they cost time and cache, and change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlo_export.checkpoints.adapter.adapter import InjectedLayer
from dlo_export.checkpoints.config import RoutingConfig
from dlo_export.checkpoints.depth.reduction import reduced_config
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import (
    layer_tensor_name,
    parse_layer_tensor,
    parse_router,
    router_name,
)
from dlo_export.exporter.sources.source import ExportSource


@dataclasses.dataclass(frozen=True)
class ReducedSource(ExportSource):
    """The same source, its layers numbered without those that were removed.

    Attributes:
        whole: With all layers; `removed_layers` are numbered in it.
    """

    whole: ExportSource = dataclasses.field(kw_only=True)

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices in `whole` of the layers that stay, ascending."""
        return tuple(layer for layer in range(self.whole.num_layers) if layer not in self.removed_layers)

    @property
    def num_layers(self) -> int:  # noqa: D102 - the source's questions, here and below
        return len(self.kept)

    @property
    def injected_layers(self) -> tuple[InjectedLayer, ...]:  # noqa: D102
        new = self._new
        return tuple(
            dataclasses.replace(layer, position=new[layer.position])
            for layer in self.whole.injected_layers
            if layer.position in new
        )

    @property
    def routers_removed(self) -> bool:  # noqa: D102
        return self.routing is None and self.whole.routing is not None

    def routers(self) -> dict[int, np.ndarray]:  # noqa: D102
        new = self._new
        return {new[layer]: router for layer, router in self.whole.routers().items() if layer in new}

    def tensors(self) -> dict[str, LazyTensor]:  # noqa: D102
        new, tensors = self._new, {}
        for name, tensor in self.whole.tensors().items():
            if (place := parse_layer_tensor(name)) is not None:
                if place.layer in new:
                    tensors[layer_tensor_name(new[place.layer], place.tensor)] = tensor
            elif (routed := parse_router(name)) is not None:
                if routed in new:
                    tensors[router_name(new[routed])] = tensor
            else:
                tensors[name] = tensor
        return tensors

    def config_values(self) -> dict[str, Any]:  # noqa: D102
        values = self.whole.config_values()
        base = {} if self.base.config is None else self.base.config.raw
        return values | reduced_config({**base, **values}, self.kept)

    @property
    def _new(self) -> dict[int, int]:
        """New index by old one."""
        return {old: new for new, old in enumerate(self.kept)}


def without_layers(source: ExportSource, layers: Sequence[int]) -> ExportSource:
    """The source without some layers; the source itself where there are none to remove.

    Args:
        source: With all of them.
        layers: Indices of layers that pass everything on.

    Raises:
        InputError: One of them does not, or none would be left.
    """
    if not layers:
        return source
    identity = source.identity_layers()
    if wrong := sorted(set(layers) - set(identity)):
        raise InputError(
            f"{source.base.path}: layers {wrong} do not pass everything on, and cannot be removed",
            hint=f"the layers whose o_proj and down_proj are all zeros: {list(identity)}",
        )
    if len(set(layers)) == source.num_layers:
        raise InputError(
            f"{source.base.path}: every layer passes everything on, so --remove-identity would leave none",
            hint="leave --remove-identity out",
        )
    removed = tuple(sorted(set(layers)))
    kept = [layer for layer in range(source.num_layers) if layer not in removed]
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(ExportSource)}
    routing = None if source.routing is None else _reduced_routing(source.routing, kept)
    return ReducedSource(**{**fields, "routing": routing, "removed_layers": removed}, whole=source)


def _reduced_routing(routing: RoutingConfig, kept: Sequence[int]) -> RoutingConfig | None:
    """None where no routed layer stays."""
    new = {old: index for index, old in enumerate(kept)}
    layers = tuple(new[layer] for layer in routing.layers if layer in new)
    thresholds = {new[layer]: threshold for layer, threshold in routing.thresholds.items() if layer in new}
    return dataclasses.replace(routing, layers=layers, thresholds=thresholds) if layers else None
