"""Tile sizes of the kernels, the one table of them, and the launch geometry that follows.

Chosen from arithmetic (what fits 99 KB of shared memory, the least on a served GPU; whole memory sectors per row), and
from the compiler's register report. They have not been tuned on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

TileName = Literal["decode", "prefill"]

DECODE_TOKENS: Final = 64
"""Up to so many tokens (batch · sequence) the decode tile is launched, beyond it the prefill tile."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        rows: Tokens; 16 is the least a tensor core instruction takes.
        columns: Columns of the output.
        depth: Elements of the summed axis per step.
        scan: Tokens read at a time while looking for active ones.
        warps: Of 32 threads each.
        stages: Steps of weights in flight.
    """

    rows: int
    columns: int
    depth: int
    scan: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """The kernel's compile-time integers."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "SCAN": self.scan}

    def grid(self, tokens: int, columns: int) -> tuple[int, int]:
        """Programs along tokens and along the output's columns; both depend on shapes alone."""
        return -(-tokens // self.rows), -(-columns // self.columns)


# Decode is bound by reading weights once: narrow tiles, so that a small model still has programs for every SM.
# SkipDown's output is narrower than SkipGateUp's, hence its tile too (16 columns of 2 bytes are one 32-byte sector).
# Prefill reads a weight tile once per 64 active tokens instead of once per 16, and scans a prompt in few steps.
_TILES: Final[dict[str, dict[TileName, Tile]]] = {
    "SkipGateUp": {
        "decode": Tile(rows=16, columns=32, depth=128, scan=64, warps=4, stages=3),
        "prefill": Tile(rows=64, columns=64, depth=64, scan=256, warps=4, stages=3),
    },
    "SkipDown": {
        "decode": Tile(rows=16, columns=16, depth=256, scan=64, warps=4, stages=3),
        "prefill": Tile(rows=64, columns=64, depth=64, scan=256, warps=4, stages=3),
    },
}


def tile_of(op_name: str, tile_name: TileName, dtype: str) -> Tile:
    """The tile of a kernel for operands of `dtype`.

    float32 takes half the depth, the same bytes, and at most 32 rows and columns: it multiplies outside the tensor
    cores, where larger tiles spill registers.
    """
    tile = _TILES[op_name][tile_name]
    if dtype == "float32":
        return dataclasses.replace(tile, rows=min(tile.rows, 32), columns=min(tile.columns, 32), depth=tile.depth // 2)
    return tile


def tile_for(tokens: int) -> TileName:
    """The tile launched for so many tokens; a function of the shape, so that nothing on the device is asked."""
    return "decode" if tokens <= DECODE_TOKENS else "prefill"
