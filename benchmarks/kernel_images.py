"""Kernels compiled ahead of time, in a folder that a machine with a GPU is given: the table's tiles and candidates.

`python -m benchmarks.kernel_images --output DIR` compiles for sm_90, on a machine that needs no GPU, and lists the
images in `DIR/images.json`. Candidates are sizes to try in place of the table's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from dlo_export.plugins.compile import CompiledKernel, compile_all
from dlo_export.plugins.tiles import Tile, TileName
from dlo_export.plugins.variants import Variant, variants

TARGET: Final = 90
PORTABLE: Final = 80
INDEX: Final = "images.json"


@dataclasses.dataclass(frozen=True)
class Image:
    """A file of code and how it is launched.

    Attributes:
        file: Its name in the folder.
        kind: "table" for the table's tile, "candidate", "portable" for PTX that every GPU's driver compiles, "own" for
            PTX of the target, which needs a driver as new as the compiler.
        op_name: The operator.
        dtype: T.
        tile: Name of the tile.
        sizes: The tile's sizes.
        entry: The kernel's name.
        threads: Per program.
        shared_bytes: Dynamic shared memory.
        registers: Per thread.
        spill_bytes: Stored to and loaded from local memory.
    """

    file: str
    kind: str
    op_name: str
    dtype: str
    tile: TileName
    sizes: Tile
    entry: str
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from others, for a row."""
        sizes = dataclasses.asdict(self.sizes)
        return {"op": self.op_name, "dtype": self.dtype, "tile": self.tile, **sizes, "registers": self.registers}


def candidates() -> Iterator[tuple[str, TileName, Tile]]:
    """Operator, tile and sizes worth a measurement. Bytes in flight decide decode, shared-memory traffic prefill."""
    # columns, depth, warps, stages
    decode = {
        "SkipGateUp": """32 128 4 3, 64 64 4 3, 64 64 4 4, 64 64 4 5, 64 64 8 4, 64 128 4 3, 64 128 8 3, 128 64 4 3,
            128 64 4 4, 128 64 8 4, 128 32 4 6""",
        "SkipDown": """16 256 4 3, 16 512 4 3, 16 512 4 4, 32 128 4 6, 32 128 4 8, 32 256 4 5, 32 256 4 6, 32 256 4 8,
            32 512 4 3, 32 512 4 4, 64 128 4 6, 64 256 4 4""",
    }
    # rows, columns, depth, warps, stages
    prefill = {
        "SkipGateUp": """64 64 64 4 3, 64 64 64 4 4, 64 64 64 4 5, 64 128 64 4 4, 64 128 64 8 3, 64 128 64 8 4,
            64 128 64 8 5, 128 64 64 8 3, 128 64 64 8 5, 128 128 32 8 3, 128 128 32 8 4, 128 128 32 8 6, 128 128 64 8 3,
            128 128 64 8 4, 256 64 32 8 4, 256 64 64 8 3, 128 128 32 8 5, 128 128 32 8 7,
            128 64 64 8 4, 128 64 64 8 6""",
        "SkipDown": """64 64 64 4 3, 64 64 64 4 4, 64 64 64 4 6, 64 64 64 4 8, 64 64 128 4 4, 64 128 64 4 4,
            64 128 64 4 5, 64 128 64 4 6, 64 128 64 4 8, 64 128 64 8 4, 64 128 64 8 6, 64 128 128 8 3, 64 128 128 8 4,
            64 128 128 4 4, 64 256 64 8 4, 128 64 64 4 6, 128 64 64 8 5, 128 64 64 8 6, 128 64 128 8 4, 128 128 64 8 4,
            128 128 64 8 5, 128 128 64 8 6, 128 128 128 8 3""",
    }
    for op_name, text in decode.items():
        for columns, depth, warps, stages in _numbers(text):
            yield op_name, "decode", Tile(16, columns, depth, 32, warps, stages)
    yield "SkipGateUp", "decode", Tile(16, 64, 64, 64, 4, 4)
    yield "SkipDown", "decode", Tile(16, 32, 512, 64, 4, 3)
    for op_name, text in prefill.items():
        for rows, columns, depth, warps, stages in _numbers(text):
            yield op_name, "prefill", Tile(rows, columns, depth, 512, warps, stages)
    yield "SkipGateUp", "prefill", Tile(128, 128, 32, 1024, 8, 4)


def _numbers(text: str) -> list[list[int]]:
    return [[int(word) for word in entry.split()] for entry in text.split(",")]


def images_in(folder: Path) -> list[Image]:
    """What a folder lists."""
    listed = json.loads((folder / INDEX).read_text())
    return [Image(**{**entry, "sizes": Tile(**entry["sizes"])}) for entry in listed]


def write_images(wanted: Sequence[tuple[str, str, Variant]], folder: Path) -> list[Image]:
    """Compiles and writes.

    Args:
        wanted: Stem of the file, kind, and what to compile.
        folder: Made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    kernels = compile_all([variant for _, _, variant in wanted])
    for (stem, kind, _), kernel in zip(wanted, kernels, strict=True):
        code = kernel.ptx.encode() + b"\0" if kind in ("portable", "own") else kernel.cubin
        file = f"{stem}.{'ptx' if kind in ('portable', 'own') else 'cubin'}"
        (folder / file).write_bytes(code)
        images.append(_image(file, kind, kernel))
    (folder / INDEX).write_text(json.dumps([dataclasses.asdict(image) for image in images], indent=1))
    return images


def _image(file: str, kind: str, kernel: CompiledKernel) -> Image:
    variant = kernel.variant
    return Image(
        file,
        kind,
        variant.op_name,
        variant.dtype,
        variant.tile,
        variant.sizes,
        kernel.entry,
        kernel.threads,
        kernel.shared_bytes,
        kernel.registers,
        kernel.spill_bytes,
    )


def all_wanted() -> list[tuple[str, str, Variant]]:
    """The table's tiles of all types, the portable PTX, one PTX of the target, and the candidates in bfloat16."""
    table = [(variant.name, "table", variant) for variant in variants([TARGET])]
    portable = [(variant.name, "portable", variant) for variant in variants([PORTABLE])]
    own = [("own", "own", Variant("SkipDown", "bfloat16", "decode", TARGET))]
    tried = [
        (f"candidate{number}", "candidate", Variant(op_name, "bfloat16", tile, TARGET, sizes))
        for number, (op_name, tile, sizes) in enumerate(candidates())
    ]
    return table + portable + own + tried


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the images")
    folder = parser.parse_args(arguments).output
    for image in write_images(all_wanted(), folder):
        print(f"{image.file} {image.facts} spills {image.spill_bytes} shared {image.shared_bytes}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
