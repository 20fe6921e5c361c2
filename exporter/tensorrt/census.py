"""Counts a parsed network's layers, and finds what makes each routed decoder layer skip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dlo_export.exporter.tensorrt.nodes import decoder_layer, network_layers, node_name
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.artefact.engine_record import LayerCensus


def take_census(trt: Any, network: Any, lowering: str, routed_layers: Sequence[int]) -> LayerCensus:
    """Counts layers by type, in all and, of the lowering's mechanism, per routed decoder layer.

    Args:
        trt: The backend's module.
        network: As parsed.
        lowering: Its name.
        routed_layers: Indices of decoder layers.
    """
    mechanism = find_lowering(lowering, "tensorrt").tensorrt_layers
    total: Counter[str] = Counter()
    skipping: dict[int, Counter[str]] = {layer: Counter() for layer in routed_layers}
    for layer in network_layers(trt, network):
        kind, index = layer.type.name, decoder_layer(node_name(trt, layer))
        total[kind] += 1
        if index in skipping and kind in mechanism:
            skipping[index][kind] += 1
    return LayerCensus(dict(sorted(total.items())), {index: dict(found) for index, found in skipping.items()})


def missing_mechanisms(census: LayerCensus, lowering: str) -> Iterator[str]:
    """A sentence for every routed layer that computes all tokens in spite of its lowering."""
    mechanism = find_lowering(lowering, "tensorrt").tensorrt_layers
    for index, found in census.skipping.items():
        if missing := sorted(mechanism - found.keys()):
            yield (
                f"decoder layer {index} is routed and does not skip: of lowering {lowering}'s layers it has "
                f"{dict(found) or 'none'}, expected {', '.join(missing)} too"
            )
