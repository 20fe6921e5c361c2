"""Routers that are all zeros: what a converted checkpoint has until it is trained or calibrated."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 8


def untrained_router_warning(layers: Sequence[int]) -> str:
    """What to tell the user of layers that skip everything.

    Args:
        layers: Whose routers are all zeros, and whose MLPs are not.
    """
    shown = ", ".join(map(str, layers[:_SHOWN])) + (f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else "")
    return (
        f"the routers of layers {shown} are all zeros: every score is exactly 0.5, "
        "which is not above their threshold, so every token skips those MLPs; fit the routers with `dlo calibrate`, "
        "train them, or set is_dlo to false there"
    )
