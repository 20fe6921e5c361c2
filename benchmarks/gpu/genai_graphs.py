"""Names of the graphs that our runner and onnxruntime-genai run beside each other: folders, and fields of rows."""

from __future__ import annotations

from typing import Final

ROUTED: Final = "routed"
"""A small routed checkpoint; the others are of one larger model."""
DENSE: Final = "dense"
"""With a cache that grows."""
IN_PLACE: Final = "dense, cache in place"
PEER: Final = "dense, its builder's graph"
"""What onnxruntime-genai's builder makes of the same weights."""
