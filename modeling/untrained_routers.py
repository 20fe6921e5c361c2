"""Routers that nobody has trained make every token skip, and whoever opens a model is told so."""

from __future__ import annotations

import warnings

from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.modeling.decoder import LlamaDloPreTrainedModel
from dlo_export.modeling.identity_layers import identity_layers


class UntrainedRoutersWarning(UserWarning):
    """Routers that are all zeros make every token skip."""


def warn_of_untrained_routers(model: LlamaDloPreTrainedModel) -> None:
    """Warns of layers that skip every token because their router is all zeros, except where that is harmless.

    Args:
        model: With a head; one without values is not looked into.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    config, routing = model.config, model.config.routing
    # A score of one half is above a lower threshold: such layers skip nobody.
    skipping = (layer for layer in config.routed_layers if config.threshold(layer) >= ONE_HALF)
    zero = {layer for layer in skipping if not model.model.router(layer).weight.any()}
    if zero and (untrained := sorted(zero - set(identity_layers(model, routing)))):
        skipped = {"mlp": "their MLPs are", "layer": "they are"}.get(routing, "their attention is")
        warnings.warn(
            f"the routers of layers {untrained} are all zeros: every score is exactly 0.5, so {skipped} skipped "
            "for every token\n\nhint: fit them with `dlo calibrate`, train them, or set is_dlo to false there",
            UntrainedRoutersWarning,
            stacklevel=3,
        )
