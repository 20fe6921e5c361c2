"""Deepens a model: its tensors and configuration after a plan's layers were injected.

Nothing here reads a whole model: the deepened tensors are computed one at a time, when they are read, from a
checkpoint's lazy ones. `dlo_export.checkpoints.checkpoint_folder` streams them to disk. Needs NumPy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlo_export.checkpoints.adapter.adapter import DloAdapter, InjectedLayer
from dlo_export.checkpoints.config import RoutingConfig
from dlo_export.checkpoints.depth.layer_init import InitialTensor
from dlo_export.checkpoints.depth.placements import METHODS, PRESETS, ExpansionError, ExpansionPlan, placements
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.llama_layer import (
    LLAMA_LAYER,
    layer_tensor_name,
    parse_layer_tensor,
    parse_router,
    router_name,
)
from dlo_export.checkpoints.model_types import (
    LLAMA,
    Family,
    RoutingKind,
    agreed_routing,
    family_of,
    routed_type,
    routing_kind,
)
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.checkpoints.router_thresholds import replaced_thresholds, thresholds_json

__all__ = [
    "METHODS",
    "PRESETS",
    "ExpansionError",
    "ExpansionPlan",
    "expanded_config",
    "expanded_tensors",
    "expansion_adapter",
    "placements",
]

PER_LAYER_LISTS = ("dlo_capacity", "layer_types", "no_rope_layers")


def expanded_tensors(
    tensors: Mapping[str, LazyTensor],
    plan: ExpansionPlan,
    *,
    zero_routers: bool = False,
    seed: int = 0,
    initializer_range: float = 0.02,
) -> dict[str, LazyTensor]:
    """The deepened model's tensors by name, in the order of its layers; nothing is read yet.

    Args:
        tensors: The base model's, under Hugging Face names.
        plan: Made for a model of as many layers.
        zero_routers: Add an all-zero float32 router [1, hidden] to every layer that has none.
        seed: Of random inits.
        initializer_range: Of random inits, the key of that name in config.json.

    Raises:
        ExpansionError: The tensors are not those of a model of `plan.num_base_layers` layers.
    """
    layers, routers, others = _sorted_by_place(tensors)
    if sorted(layers) != list(range(plan.num_base_layers)):
        raise ExpansionError(
            f"expansion: found tensors of layers {sorted(layers)}, expected 0 to {plan.num_base_layers - 1}",
            hint="the plan was made for another model, or the checkpoint is incomplete",
        )
    injected = {layer.position: layer for layer in plan.injected_layers}
    originals = iter(range(plan.num_base_layers))
    result: dict[str, LazyTensor] = {}
    # Position by position in the deepened model: an injected layer is computed from its source and the layer that was
    # before that, any other position holds the next original layer.
    for position in range(plan.num_layers):
        layer = injected.get(position)
        roles: Mapping[str, LazyTensor]
        if layer is None:
            roles = layers[next(originals)]
        else:
            before: Mapping[str, LazyTensor] = layers.get(layer.source - 1, {})
            roles = {
                role: InitialTensor(
                    layer.init,
                    role,
                    source,
                    before.get(role),
                    seed=(seed, position),
                    initializer_range=initializer_range,
                )
                for role, source in layers[layer.source].items()
            }
        result |= {layer_tensor_name(position, role): tensor for role, tensor in roles.items()}
    # Routers follow their layers.
    placed = {plan.original_positions[layer]: tensor for layer, tensor in routers.items()}
    if zero_routers:
        hidden = layers[0][LLAMA_LAYER["o_proj"].weight].shape[0]
        zero = ArrayTensor(np.zeros((1, hidden), np.float32))
        placed = {position: placed.get(position, zero) for position in range(plan.num_layers)}
    result |= {router_name(position): placed[position] for position in sorted(placed)}
    return others | result


def expanded_config(
    config: Mapping[str, Any],
    plan: ExpansionPlan,
    *,
    zero_routers: bool = False,
    routing: RoutingKind | None = None,
) -> dict[str, Any]:
    """The keys of config.json that the deepened model changes.

    A model without routers keeps its type; one with routers gets the DLO authors' keys. Per-layer lists follow
    their layers; `injected_layers` of a model that was deepened before is carried over, sources counted in the model
    that was there first.

    Args:
        config: The base model's config.json.
        plan: The new layers.
        zero_routers: Whether every layer gets a router, see `expanded_tensors`.
        routing: What these skip; None for what the model's routers skip, and MLPs where it has none.

    Raises:
        ExpansionError: A per-layer list has another length than the model.
        CheckpointError: The model's routers skip something else.
    """
    changes: dict[str, Any] = {
        "num_hidden_layers": plan.num_layers,
        "injected_layers": [dataclasses.asdict(layer) for layer in _all_injected_layers(config, plan)],
    }
    for key in PER_LAYER_LISTS:
        if isinstance(config.get(key), list):
            changes[key] = _placed(config[key], plan, key)
    routed = config.get("is_dlo")
    if isinstance(routed, bool):
        routed = [routed] * plan.num_base_layers
    if routed is not None:
        # A new layer's router would be untrained: it has none unless it was asked for.
        changes["is_dlo"] = _placed(routed, plan, "is_dlo", injected=False)
    if config.get(THRESHOLDS):
        # They follow their routers; a new layer's, where it gets one, has the threshold of one half.
        moved = {plan.original_positions[int(layer)]: threshold for layer, threshold in config[THRESHOLDS].items()}
        changes[THRESHOLDS] = thresholds_json(moved)
    if zero_routers:
        is_dlo = [True] * plan.num_layers
        own = routing_kind(config) if routed and any(routed) else None
        agreed = agreed_routing(own, routing)
        family = family_of(config)
        changes |= {"is_dlo": is_dlo} if own is not None else routed_config(is_dlo, routing=agreed, family=family)
    return changes


def routed_config(
    is_dlo: Sequence[bool],
    *,
    routing: RoutingKind = "mlp",
    rescale: bool = False,
    scale_factor: float = 2.0,
    scale_gap: float = 0.0,
    thresholds: Mapping[int, float] | None = None,
    family: Family = LLAMA,
) -> dict[str, Any]:
    """The keys of config.json that make a model a routed one; by default, active branches are taken as they are.

    Args:
        is_dlo: Per layer, whether it is routed.
        routing: What a token skips there.
        rescale: Whether an active branch is multiplied, see `RoutingConfig`.
        scale_factor: Of the factor. With the defaults it is 1 by either reading, as it must be where the base model was
            not trained with a scale.
        scale_gap: Likewise.
        thresholds: By routed layer, where it is not 0.5.
        family: Of the model.
    """
    layers = tuple(layer for layer, routed in enumerate(is_dlo) if routed)
    rule = RoutingConfig(routing, layers, rescale, scale_factor, scale_gap, thresholds or {})
    kind = routed_type(routing, thresholds=bool(thresholds), family=family)
    return rule.values(len(is_dlo), family) | {"architectures": [kind.architecture]}


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that make a model a dense one, whatever of it was routed; its type stays.

    Args:
        config: The model's config.json.
    """
    return {"is_dlo": False, "rescale_hidden_states": False, **replaced_thresholds(config, {})}


def expansion_adapter(
    tensors: Mapping[str, LazyTensor],
    plan: ExpansionPlan,
    *,
    zero_routers: bool = False,
    seed: int = 0,
    initializer_range: float = 0.02,
    routing: RoutingKind = "mlp",
    base_sha256: str | None = None,
) -> DloAdapter:
    """The deepening as an adapter on the base model: injected layers, and routers if asked for.

    Arguments are those of `expanded_tensors`; `routing` says what the routers skip, `base_sha256` identifies the base
    model's weights.

    Raises:
        ExpansionError: The base model is routed, or not the one the plan was made for.
    """
    if any(parse_router(name) is not None for name in tensors):
        raise ExpansionError(
            "expansion: the model has routers, an adapter goes on a plain one",
            hint="write a checkpoint, or take the checkpoint the model was made from",
        )
    names = [router_name(layer) for layer in range(plan.num_layers)] if zero_routers else []
    prefixes = tuple(layer_tensor_name(layer.position, "") for layer in plan.injected_layers)
    deepened = expanded_tensors(
        tensors, plan, zero_routers=zero_routers, seed=seed, initializer_range=initializer_range
    )
    return DloAdapter(
        routing=routing,
        is_dlo=(zero_routers,) * plan.num_layers,
        injected_layers=plan.injected_layers,
        base_sha256=base_sha256,
        tensors={name: tensor for name, tensor in deepened.items() if name.startswith(prefixes) or name in names},
    )


def _sorted_by_place(
    tensors: Mapping[str, LazyTensor],
) -> tuple[dict[int, dict[str, LazyTensor]], dict[int, LazyTensor], dict[str, LazyTensor]]:
    """Tensors of layers by index and role, routers by index, and all others by name."""
    layers: dict[int, dict[str, LazyTensor]] = {}
    routers: dict[int, LazyTensor] = {}
    others: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if (place := parse_layer_tensor(name)) is not None:
            layers.setdefault(place.layer, {})[place.tensor] = tensor
        elif (routed_layer := parse_router(name)) is not None:
            routers[routed_layer] = tensor
        else:
            others[name] = tensor
    return layers, routers, others


def _placed(values: Sequence[Any], plan: ExpansionPlan, key: str, **injected: Any) -> list[Any]:
    """A per-layer list, as one of the deepened model; new layers take their source's value, or `injected` if given."""
    if len(values) != plan.num_base_layers:
        raise ExpansionError(
            f"expansion: config.json has {len(values)} entries in {key}, expected {plan.num_base_layers}",
            hint="the list has one entry per layer",
        )
    result: list[Any] = [None] * plan.num_layers
    for value, position in zip(values, plan.original_positions, strict=True):
        result[position] = value
    for layer in plan.injected_layers:
        result[layer.position] = injected.get("injected", values[layer.source])
    return result


def _all_injected_layers(config: Mapping[str, Any], plan: ExpansionPlan) -> list[InjectedLayer]:
    """Layers injected now and before, all counted in the deepened model and the one that was there first."""
    earlier = {entry["position"]: InjectedLayer(**entry) for entry in config.get("injected_layers") or ()}
    first_index: dict[int, int] = {}
    for layer in range(plan.num_base_layers):
        first_index[layer] = earlier[layer].source if layer in earlier else layer - sum(p < layer for p in earlier)
    moved = [dataclasses.replace(e, position=plan.original_positions[e.position]) for e in earlier.values()]
    added = [dataclasses.replace(layer, source=first_index[layer.source]) for layer in plan.injected_layers]
    return sorted(moved + added, key=lambda layer: layer.position)
