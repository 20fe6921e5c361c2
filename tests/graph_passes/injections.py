"""Layers to insert whose weights follow from the source's by an init, as an adapter brings them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass, LayerInjection
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from tests.initial_arrays import init_tensor


def injected_weights(
    model: ir.Model, position: int, source: int, init: str, *, seed: int = 0, initializer_range: float = 0.02
) -> dict[str, np.ndarray]:
    """Weights of one layer to insert, in checkpoint orientation, by their names inside the layer."""
    layers = find_decoder_layers(model.graph)
    previous = layers[source - 1].projections if source else {}
    return {
        projection.tensor: init_tensor(
            init,
            projection.tensor,
            projection.contents.numpy(),
            previous[role].contents.numpy() if role in previous else None,
            seed=(seed, position),
            initializer_range=initializer_range,
        )
        for role, projection in layers[source].projections.items()
    }


def injection_pass(
    model: ir.Model, plan: Iterable[tuple[int, int]], init: str, *, seed: int = 0, initializer_range: float = 0.02
) -> InjectLayersPass:
    """The pass that inserts a layer at each position of the plan, derived from the source beside it."""
    return InjectLayersPass(
        tuple(
            LayerInjection(
                position,
                source,
                injected_weights(model, position, source, init, seed=seed, initializer_range=initializer_range),
            )
            for position, source in plan
        )
    )
