"""Routers that are all zeros: what a converted checkpoint has until it is trained or calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dlo_export.checkpoints.model_types import RoutingKind

_SHOWN = 8
_SKIPPED: Mapping[RoutingKind, str] = {
    "mlp": "MLPs",
    "layer": "layers",
    "attention": "attentions",
    "attention-active": "attentions",
}


def untrained_router_warning(layers: Sequence[int], routing: RoutingKind) -> str:
    """What to tell the user of layers that skip everything.

    Args:
        layers: Whose routers are all zeros, and what they skip is not.
        routing: What they skip.
    """
    shown = ", ".join(map(str, layers[:_SHOWN])) + (f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else "")
    return (
        f"the routers of layers {shown} are all zeros: every score is exactly 0.5, "
        f"which is not above their threshold, so every token skips those {_SKIPPED[routing]}; "
        "fit the routers with `dlo calibrate`, train them, or set is_dlo to false there"
    )
