"""A model without some of its layers: what its config.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlo_export.checkpoints.depth.expansion import PER_LAYER_LISTS
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS


def reduced_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The keys of config.json that a model of fewer layers changes.

    Sources of injected layers stay what they are: they are counted in the model that was there first.

    Args:
        config: Of the whole model.
        kept: Indices of the layers that stay, ascending.
    """
    new = {old: index for index, old in enumerate(kept)}
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in (*PER_LAYER_LISTS, "is_dlo"):
        if isinstance(values := config.get(key), list):
            changes[key] = [values[layer] for layer in kept]
    if injected := config.get("injected_layers"):
        changes["injected_layers"] = [
            {**entry, "position": new[entry["position"]]} for entry in injected if entry["position"] in new
        ]
    if thresholds := config.get(THRESHOLDS):
        changes[THRESHOLDS] = {str(new[int(layer)]): value for layer, value in thresholds.items() if int(layer) in new}
    return changes
