"""Tile sizes of the kernels, the one table of them, and the launch geometry that follows.

Chosen from arithmetic (what fits 99 KB of shared memory, the least on a served GPU; whole memory sectors per row), and
from the compiler's register report. They have not been tuned on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

TileName = Literal["single", "decode", "prefill"]
TILE_NAMES: Final[tuple[TileName, ...]] = get_args(TileName)

MOST_TOKENS: Final[Mapping[TileName, int]] = {"single": 1, "decode": 64}
"""The tile launched for so many tokens (batch · sequence) or fewer; beyond all of them it is prefill's."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        rows: Tokens; 1, or at least the 16 that a tensor core instruction takes.
        columns: Columns of the output.
        depth: Elements of the summed axis per step.
        scan: Tokens read at a time while looking for active ones.
        warps: Of 32 threads each.
        stages: Steps of weights in flight.
        eviction: What the cache is told of weights where `rows` is 1: Triton's eviction_policy.
    """

    rows: int
    columns: int
    depth: int
    scan: int
    warps: int
    stages: int
    eviction: str = ""

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time values."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "SCAN": self.scan,
            "STAGES": self.stages,
            "EVICTION": self.eviction,
        }

    def grid(self, tokens: int, columns: int) -> tuple[int, int]:
        """Programs along tokens and along the output's columns; both depend on shapes alone."""
        return -(-tokens // self.rows), -(-columns // self.columns)


# A single token's weights are read once and multiplied on CUDA cores: what counts is bytes in flight in every SM.
# Decode is bound by reading weights once: narrow tiles, so that a small model still has programs for every SM.
# SkipDown's output is narrower than SkipGateUp's, hence its tile too (16 columns of 2 bytes are one 32-byte sector).
# Prefill reads a weight tile once per 64 active tokens instead of once per 16, and scans a prompt in few steps.
_TILES: Final[dict[str, dict[TileName, Tile]]] = {
    "SkipGateUp": {
        "single": Tile(rows=1, columns=32, depth=128, scan=1, warps=4, stages=1),
        "decode": Tile(rows=16, columns=32, depth=128, scan=64, warps=4, stages=3),
        "prefill": Tile(rows=64, columns=64, depth=64, scan=256, warps=4, stages=3),
    },
    "SkipDown": {
        "single": Tile(rows=1, columns=32, depth=512, scan=1, warps=16, stages=1),
        "decode": Tile(rows=16, columns=16, depth=256, scan=64, warps=4, stages=3),
        "prefill": Tile(rows=64, columns=64, depth=64, scan=256, warps=4, stages=3),
    },
}
# By compute capability, where a GPU was at hand to measure it.
_TUNED: Final[dict[int, dict[str, dict[TileName, Tile]]]] = {}


def tile_of(op_name: str, tile_name: TileName, dtype: str, target: int | None = None) -> Tile:
    """The tile of a kernel for operands of `dtype`.

    float32 takes half the depth, the same bytes, and at most 32 rows and columns: it multiplies outside the tensor
    cores, where larger tiles spill registers.

    Args:
        op_name: "SkipGateUp" or "SkipDown".
        tile_name: Of the tile.
        dtype: T, as the schema names it.
        target: Compute capability, such as 90; None for a tile that every GPU takes.
    """
    tile = _TILES[op_name][tile_name]
    if dtype == "float32":
        return dataclasses.replace(tile, rows=min(tile.rows, 32), columns=min(tile.columns, 32), depth=tile.depth // 2)
    return _TUNED.get(target or 0, {}).get(op_name, {}).get(tile_name, tile)


def tile_for(tokens: int) -> TileName:
    """The tile launched for so many tokens; a function of the shape, so that nothing on the device is asked."""
    return next((name for name, most in MOST_TOKENS.items() if tokens <= most), TILE_NAMES[-1])
