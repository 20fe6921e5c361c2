"""Tile sizes of the kernels, the one table of them, and the launch geometry that follows.

Chosen from arithmetic (what fits 99 KB of shared memory, the least on a served GPU; whole memory sectors per row), and
from the compiler's register report; for compute capability 9.0 from measurements, for no other yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Literal, get_args

TileName = Literal["decode", "prefill"]
TILE_NAMES: Final[tuple[TileName, ...]] = get_args(TileName)

MOST_TOKENS: Final[Mapping[TileName, int]] = {"decode": 64}
"""The tile launched for so many tokens (batch · sequence) or fewer; beyond all of them it is prefill's."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        rows: Tokens; 16 is the least a tensor core instruction takes.
        columns: Columns of the output.
        depth: Elements of the summed axis per step.
        scan: Tokens read at a time while looking for active ones, a multiple of 32; RouterScores looks for none.
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
        "decode": Tile(rows=16, columns=32, depth=128, scan=32, warps=4, stages=3),
        "prefill": Tile(rows=64, columns=64, depth=64, scan=512, warps=4, stages=3),
    },
    "SkipDown": {
        "decode": Tile(rows=16, columns=16, depth=256, scan=32, warps=4, stages=3),
        "prefill": Tile(rows=64, columns=64, depth=64, scan=512, warps=4, stages=3),
    },
    # A token's score is one sum: every tile is one token, 1024 elements of it a step (float32: 512). Every token has a
    # score, so that nothing is scanned: the kernel takes scan and leaves it unused.
    "RouterScores": dict.fromkeys(TILE_NAMES, Tile(rows=1, columns=1, depth=1024, scan=1, warps=4, stages=1)),
}
# By compute capability, where a GPU was at hand to measure it. 9.0: H200, hidden 4096, intermediate 14336, bfloat16;
# from docs/results/gpu_kernels.md. Decode, 8 of 16 tokens active: 56 and 33 µs, 4.2 and 3.6 TB/s of weights (the tiles
# above: 77 and 50 µs). Prefill, 256 of 512 active: 102 and 81 µs (155 and 109 µs). With 64 rows SkipDown takes 76 µs,
# but from 257 active tokens on it then has more programs than the card has SMs, and goes round twice.
_TUNED: Final[dict[int, dict[str, dict[TileName, Tile]]]] = {
    90: {
        "SkipGateUp": {
            "decode": Tile(rows=16, columns=128, depth=64, scan=32, warps=4, stages=4),
            "prefill": Tile(rows=128, columns=128, depth=32, scan=512, warps=8, stages=5),
        },
        "SkipDown": {
            "decode": Tile(rows=16, columns=32, depth=256, scan=32, warps=4, stages=5),
            "prefill": Tile(rows=128, columns=128, depth=64, scan=512, warps=8, stages=6),
        },
    }
}


def tile_of(op_name: str, tile_name: TileName, dtype: str, target: int | None = None) -> Tile:
    """The tile of a kernel for operands of `dtype`.

    float32 takes half the depth, the same bytes, and at most 32 rows and columns: it multiplies outside the tensor
    cores, where larger tiles spill registers.

    Args:
        op_name: "SkipGateUp", "SkipDown" or "RouterScores".
        tile_name: Of the tile.
        dtype: T, as the schema names it.
        target: Compute capability, such as 90; None for a tile that every GPU takes.
    """
    tile = _TILES[op_name][tile_name]
    if dtype == "float32":
        return dataclasses.replace(tile, rows=min(tile.rows, 32), columns=min(tile.columns, 32), depth=tile.depth // 2)
    return _TUNED.get(target or 0, {}).get(op_name, {}).get(tile_name, tile)


# What Triton's JIT makes of a tile is not what the newer compiler of the cubins does. 9.0, Triton 3.6, both kernels
# with one token: 87.6 µs at an 8B's widths and 35.9 at a 1B's, where the tiles of the cubins take 91.9 and 41.4.
_TUNED_JIT: Final[dict[int, dict[str, dict[TileName, Tile]]]] = {
    90: {
        "SkipGateUp": {"decode": Tile(rows=16, columns=64, depth=64, scan=32, warps=4, stages=4)},
        "SkipDown": {"decode": Tile(rows=16, columns=32, depth=512, scan=32, warps=4, stages=3)},
    }
}


def jit_tile_of(op_name: str, tile_name: TileName, dtype: str, target: int) -> Tile:
    """`tile_of` for a kernel that is compiled where it runs."""
    tile = tile_of(op_name, tile_name, dtype, target)
    if dtype == "float32":
        return tile
    return _TUNED_JIT.get(target, {}).get(op_name, {}).get(tile_name, tile)


def tile_for(tokens: int) -> TileName:
    """The tile launched for so many tokens; a function of the shape, so that nothing on the device is asked."""
    return next((name for name, most in MOST_TOKENS.items() if tokens <= most), TILE_NAMES[-1])
