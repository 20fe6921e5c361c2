"""The config.json of a model that is trained: as training starts, and once it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlo_export.checkpoints.depth.expansion import dense_config, routed_config
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.llama_layer import parse_router, router_name
from dlo_export.checkpoints.model_types import (
    RoutingKind,
    agreed_routing,
    family_of,
    kv_keys,
    routed_type,
    routing_kind,
)
from dlo_export.checkpoints.router_thresholds import replaced_thresholds
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.settings import TrainingSettings


def starting_model(
    source: ExportSource, routers: str, routing: RoutingKind | None
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The config.json and tensors of the model as training starts.

    Args:
        source: The model, and the adapter on it.
        routers: ``keep``, ``add`` or ``none``, see `TrainRequest`.
        routing: What tokens skip; None for what the model's routers skip, and MLPs where it has none.

    Raises:
        TrainingError: It has no routers to keep, or a routing is named and none of them is left.
        CheckpointError: Its routers skip something else.
    """
    injected = [dataclasses.asdict(layer) for layer in source.injected_layers]
    config, tensors = source.config_json() | {"injected_layers": injected}, source.tensors()
    if routers == "none":
        if routing is not None:
            raise TrainingError(f"--routing {routing}: --routers none leaves none", hint="leave one of the two out")
        plain = {name: tensor for name, tensor in tensors.items() if parse_router(name) is None}
        return config | dense_config(config), plain
    agreed = agreed_routing(None if source.routing is None else source.routing.kind, routing)
    if routers == "add":
        if source.routing is None:
            config |= routed_config([True] * source.num_layers, routing=agreed, family=family_of(config))
        config["is_dlo"] = [True] * source.num_layers
        zeros: dict[str, LazyTensor] = {
            router_name(layer): ArrayTensor(np.zeros((1, config["hidden_size"]), np.float32))
            for layer in range(source.num_layers)
        }
        return config, zeros | tensors
    if source.routing is None:
        raise TrainingError(
            f"{source.base.path}: has no routed layer",
            hint="--routers add gives every layer a router, --routers none trains the model as it is; `dlo calibrate` "
            "makes routers to start from",
        )
    return config, tensors


def trained_config(
    source: ExportSource, config: Mapping[str, Any], settings: TrainingSettings, thresholds: Mapping[int, float]
) -> dict[str, Any]:
    """What config.json says of the trained model beyond the base model's.

    Args:
        source: The model as it was opened.
        config: As `starting_model` gave it.
        settings: It was trained by.
        thresholds: Of its routers, by layer, where they are not one half.
    """
    changes = source.config_values() | {"dtype": "float32", "torch_dtype": "float32"}
    changes |= replaced_thresholds(source.config_json(), thresholds)
    if config.get("is_dlo") is False:  # --routers none
        family = family_of(config)
        dense = {"model_type": family.name, "architectures": [f"{family.prefix}ForCausalLM"], "is_dlo": False}
        return changes | (dense | kv_keys(None, source.config_json()) if source.routing is not None else {})
    routing = routing_kind(config)
    assert routing is not None, "or it was not routed"
    kind = routed_type(routing, thresholds=bool(thresholds), family=family_of(config))
    kept = ("architectures", "is_dlo", "rescale_hidden_states", "scale_factor", "scale_gap")
    return changes | {
        **{key: config[key] for key in kept if key in config},
        "model_type": kind.name,
        **kv_keys(routing, source.config_json()),
        **({"architectures": [kind.architecture]} if thresholds else {}),
        "dlo_capacity": settings.target,
        "dlo_loss_type": settings.labels,
        "dlo_loss_coefficient": settings.skip_weight,
    }
