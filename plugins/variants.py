"""What the kernels are compiled for: operators, types, tiles and GPUs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Final

from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.contract import T_DTYPES
from dlo_export.plugins.tiles import TILE_NAMES, Tile, TileName, tile_of

TARGETS: Final = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, tens and units: A100, consumer Ampere, Ada, Hopper, Blackwell (data centre, consumer)."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    Attributes:
        op_name: The operator.
        dtype: T, as the schema names it.
        tile: Name of the tile.
        target: Compute capability, such as 89.
        candidate: Sizes to try in place of the table's.
    """

    op_name: str
    dtype: str
    tile: TileName
    target: int
    candidate: Tile | None = None

    @property
    def sizes(self) -> Tile:
        """The tile's sizes."""
        return self.candidate or tile_of(self.op_name, self.tile, self.dtype, self.target)

    @property
    def name(self) -> str:
        """Stem of the variant's files."""
        return f"{self.op_name}_{self.dtype}_{self.tile}_sm{self.target}"


def variants(
    targets: Iterable[int] = TARGETS,
    dtypes: Iterable[str] = T_DTYPES,
    ops: Iterable[str] = tuple(PLUGIN_OPS),
) -> list[Variant]:
    """Every combination of operator, dtype, tile and target."""
    return [Variant(*choice) for choice in itertools.product(ops, dtypes, TILE_NAMES, targets)]
