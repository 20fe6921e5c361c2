"""Which nodes ONNX Runtime gave to another provider than the one asked for; none of a layer may be among them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

# By their names: what computes shapes for all layers has no number, and belongs on the host.
_OF_A_LAYER: Final = re.compile(r"\.(layers|routers)\.\d+\.")


def placement_facts(placed: Mapping[str, Sequence[tuple[str, str]]], wanted: str) -> dict[str, Any]:
    """What a row says of it, its verdict included.

    Args:
        placed: By provider, name and operator of the nodes it was given.
        wanted: The provider that was asked for.
    """
    elsewhere = [node for name, nodes in placed.items() if name != wanted for node in nodes]
    of_layers = [f"{name} ({operator})" for name, operator in elsewhere if _OF_A_LAYER.search(name)]
    return {
        # Of a graph that nobody was given a node of, nothing is known.
        "passed": bool(placed.get(wanted)) and not of_layers,
        "given": {name: len(nodes) for name, nodes in placed.items()},
        "elsewhere": dict(Counter(operator for _, operator in elsewhere)),
        "of_layers": of_layers[:8],
    }
