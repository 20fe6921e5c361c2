"""Cases for the dlo kernels on a GPU: operands, what NumPy makes of them, and how far an output is from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import ml_dtypes
import numpy as np

from dlo_export.plugins.skip_down.reference import skip_down
from dlo_export.plugins.skip_gate_up.reference import skip_gate_up
from dlo_export.plugins.tiles import TileName

NUMPY: Final = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LARGEST_ERROR: Final = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
"""Of the row's largest output."""
MASKS: Final = ("all", "none", "one", "alternating", "random", "nan")
POISON: Final = 0x7F
"""Every byte of an output before a launch: a NaN or a huge number in all three dtypes."""
# (batch, sequence, hidden, intermediate) by tile: whole tiles, less than one, and widths that no tile divides.
SIZES: Final[dict[TileName, tuple[tuple[int, int, int, int], ...]]] = {
    "decode": ((1, 1, 576, 1536), (1, 1, 72, 1048), (4, 1, 576, 1536), (3, 11, 72, 1048), (1, 64, 72, 1048)),
    "prefill": ((1, 96, 576, 1536), (3, 91, 72, 1048), (1, 1000, 72, 136)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch and what is right.

    Attributes:
        name: Unique among all cases.
        op_name: The operator.
        dtype: T, as the schema names it.
        tile: Launched for so many tokens.
        mask: Name of the pattern of active tokens.
        inputs: The schema's, NumPy; scale is the second.
        expected: The reference's output.
    """

    name: str
    op_name: str
    dtype: str
    tile: TileName
    mask: str
    inputs: tuple[np.ndarray, ...]
    expected: np.ndarray

    @property
    def scale(self) -> np.ndarray:
        """float32 [batch, sequence]."""
        return self.inputs[1]

    def judge(self, output: np.ndarray) -> dict[str, Any]:
        """How far an output, poisoned before the launch, is from what is right.

        Args:
            output: T, of the expected shape.

        Returns:
            error: the largest, of its row's largest output; skipped_rows_kept: whether a skipped token's row is as it
            must be to the bit (SkipGateUp: still poison; SkipDown: the residual); passed: both hold.
        """
        skipped = self.scale == 0
        due = self.expected[skipped]
        if self.op_name == "SkipGateUp":
            due = np.frombuffer(bytes([POISON]) * due.nbytes, due.dtype).reshape(due.shape)
        kept = output[skipped].tobytes() == due.tobytes()
        got, right = output[~skipped].astype(np.float64), self.expected[~skipped].astype(np.float64)
        same_nan = bool((np.isnan(got) == np.isnan(right)).all())
        largest = np.nanmax(np.abs(right), axis=-1, keepdims=True, initial=1e-30)
        error = float(np.nanmax(np.abs(got - right) / largest, initial=0))
        return {
            "error": error,
            "skipped_rows_kept": kept,
            "passed": kept and same_nan and error <= LARGEST_ERROR[self.dtype],
        }


def cases(op_name: str, dtype: str, tile: TileName, masks: tuple[str, ...] = MASKS, seed: int = 0) -> Iterator[Case]:
    """A case for every size of the tile and every mask that says something of so many tokens."""
    for number, (batch, sequence, hidden, intermediate) in enumerate(SIZES[tile]):
        rng = np.random.default_rng([seed, number])
        for mask in masks:
            if batch * sequence == 1 and mask not in ("all", "none", "nan"):
                continue
            scale = scales(rng, mask, batch, sequence)
            inputs = operands(rng, op_name, dtype, scale, hidden, intermediate)
            name = f"{op_name}_{dtype}_{tile}_{number}_{mask}"
            yield Case(name, op_name, dtype, tile, mask, inputs, reference(op_name, inputs))


def reference(op_name: str, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """The operator's definition."""
    with np.errstate(all="ignore"):  # NaN scales, and skipped tokens' rows of any bits
        return {"SkipGateUp": skip_gate_up, "SkipDown": skip_down}[op_name](*inputs)


def scales(rng: np.random.Generator, mask: str, batch: int, sequence: int) -> np.ndarray:
    """float32 [batch, sequence] with a pattern of active tokens; skipped ones are 0 or -0."""
    tokens = batch * sequence
    active = {
        "all": np.ones(tokens, bool),
        "none": np.zeros(tokens, bool),
        "one": np.arange(tokens) == tokens // 2,
        "alternating": np.arange(tokens) % 2 == 0,
        "random": rng.random(tokens) < 0.5,
        "nan": np.ones(tokens, bool),
    }[mask]
    values = np.where(active, rng.uniform(0.2, 2, tokens), rng.choice([0.0, -0.0], tokens)).astype(np.float32)
    if mask == "nan":
        values[-1] = np.nan
    return values.reshape(batch, sequence)


def operands(
    rng: np.random.Generator, op_name: str, dtype: str, scale: np.ndarray, hidden: int, intermediate: int
) -> tuple[np.ndarray, ...]:
    """The operator's inputs; rows that a skipped token must not have read, or must pass on, hold what shows it."""
    batch, sequence = scale.shape
    skipped = scale == 0

    def values(*shape: int, divisor: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) / divisor).astype(np.float32).astype(NUMPY[dtype])

    if op_name == "SkipGateUp":
        weights = [values(hidden, intermediate, divisor=hidden**0.5) for _ in range(2)]
        return values(batch, sequence, hidden), scale, *weights
    gated, residual = values(batch, sequence, intermediate), values(batch, sequence, hidden)
    gated[skipped] = np.nan
    patterns = rng.integers(0, 256, residual.nbytes, np.uint8).view(residual.dtype).reshape(residual.shape)
    residual[skipped] = patterns[skipped]
    return gated, scale, values(intermediate, hidden, divisor=intermediate**0.5), residual
