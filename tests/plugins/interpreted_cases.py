"""Runs the kernels under Triton's interpreter on random cases and prints, as JSON, how far they are from NumPy.

A program of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

import itertools
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import torch
from triton.runtime.interpreter import interpreter_builder

from dlo_export.plugins.kernels import launch
from dlo_export.plugins.skip_down.reference import skip_down
from dlo_export.plugins.skip_gate_up.reference import skip_gate_up
from dlo_export.plugins.tiles import TILE_NAMES, tile_of

NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MASKS = ("empty", "full", "one row", "ragged")
UNWRITTEN = 0x7F  # every byte of an output buffer before the launch: a NaN or a huge number in all three dtypes


def all_cases():
    """(dtype, mask, tile, size) of every case of a kernel: sizes alternate, so that every two of the four meet.

    What chooses rows, what cuts columns and sums, and what rounds are apart in the kernels: a fault takes two of these.
    """
    for (d, dtype), (m, mask), (t, tile) in itertools.product(*map(enumerate, (NUMPY, MASKS, TILE_NAMES))):
        yield dtype, mask, tile, ("edge", "any")[(d + m + t) % 2]
    for (m, mask), (t, tile) in itertools.product(enumerate(MASKS), enumerate(TILE_NAMES)):
        yield list(NUMPY)[(m + t) % 3], mask, tile, "long"


def random_case(op_name, rng, dtype, mask, tile_name, size):
    tile = tile_of(op_name, tile_name, dtype)
    if size == "long":  # more tokens than one scan reads, and more active rows than one tile holds
        batch, sequence = 3, tile.scan // 3 + 1
    else:
        batch, sequence = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    columns, depth = (random_size(rng, of_tile, size) for of_tile in (tile.columns, tile.depth))
    hidden, intermediate = (depth, columns) if op_name == "SkipGateUp" else (columns, depth)
    active = np.zeros(batch * sequence, bool)
    if mask == "full":
        active[:] = True
    elif mask == "one row":
        active[rng.integers(len(active))] = True
    elif mask == "ragged":
        active = rng.random(len(active)) < rng.random()
    scale = np.where(active, rng.uniform(0.2, 2, len(active)), rng.choice([0.0, -0.0], len(active)))
    return (batch, sequence, hidden, intermediate), scale.astype(np.float32).reshape(batch, sequence)


def random_size(rng, of_tile, size):
    """Of columns or of what is summed: up to a tile of them; one more than a tile has; up to one more than two have."""
    least, most = {"long": (1, of_tile), "edge": (of_tile + 1, of_tile + 1), "any": (1, 2 * of_tile + 1)}[size]
    return int(rng.integers(least, most + 1))


def values(rng, shape, dtype, divisor=1.0):
    return (rng.standard_normal(shape) / divisor).astype(np.float32).astype(NUMPY[dtype])


def as_torch(array):
    bits = np.ascontiguousarray(array).view({2: np.int16, 4: np.int32}[array.itemsize])
    return torch.from_numpy(bits.copy()).view(TORCH[str(array.dtype)])


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def run(op_name, rng, dtype, mask, tile, size):
    (batch, sequence, hidden, intermediate), scale = random_case(op_name, rng, dtype, mask, tile, size)
    skipped = scale == 0
    if op_name == "SkipGateUp":
        inputs = (
            values(rng, (batch, sequence, hidden), dtype),
            scale,
            values(rng, (hidden, intermediate), dtype, hidden**0.5),
            values(rng, (hidden, intermediate), dtype, hidden**0.5),
        )
        expected = skip_gate_up(*inputs)
    else:
        gated = values(rng, (batch, sequence, intermediate), dtype)
        gated[skipped] = np.nan  # nobody may read them
        residual = values(rng, (batch, sequence, hidden), dtype)
        # every bit pattern of T, NaN payloads among them, must come through a skipped token
        patterns = rng.integers(0, 256, residual.nbytes, np.uint8).view(residual.dtype).reshape(residual.shape)
        residual[skipped] = patterns[skipped]
        inputs = (gated, scale, values(rng, (intermediate, hidden), dtype, intermediate**0.5), residual)
        expected = skip_down(*inputs)
    output = torch.full((expected.nbytes,), UNWRITTEN, dtype=torch.uint8).view(TORCH[dtype]).reshape(expected.shape)
    untouched = bits_of(output).copy()
    writes = counted_writes(output)
    launch(op_name, *map(as_torch, inputs), output, dtype=dtype, tile_name=tile)
    counts = writes()
    bits = bits_of(output)
    got = bits.view(NUMPY[dtype])
    kept = untouched if op_name == "SkipGateUp" else bits_of(as_torch(expected))
    due = np.broadcast_to(~skipped[..., None] if op_name == "SkipGateUp" else True, expected.shape)
    active = ~skipped
    wide, reference = got[active].astype(np.float64), expected[active].astype(np.float64)
    largest = np.abs(reference).max(axis=-1, keepdims=True)
    return {
        "case": f"{op_name}: {dtype}, {mask}, {tile}, {size}, shape {(batch, sequence, hidden, intermediate)}",
        "dtype": dtype,
        "mask": mask,
        "error": float((np.abs(wide - reference) / np.maximum(largest, 1e-30)).max(initial=0)),
        "skipped_rows_kept": bool((bits[skipped] == kept[skipped]).all()),
        "written_once": bool((counts.reshape(expected.shape) == due).all()),
    }


def counted_writes(output):
    """Starts counting the stores to each element of `output`; the returned function stops, and tells."""
    counts = np.zeros(output.numel(), np.int64)
    first, size = output.data_ptr(), output.element_size()
    store = interpreter_builder.create_masked_store

    def counting_store(pointers, value, mask, *options):
        offsets = pointers.data[mask.data].astype(np.int64) - first
        np.add.at(counts, offsets // size, 1)  # an address outside the output raises
        return store(pointers, value, mask, *options)

    interpreter_builder.create_masked_store = counting_store

    def stop():
        interpreter_builder.create_masked_store = store
        return counts

    return stop


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(
        [
            run(op_name, np.random.default_rng(number), *case)
            for op_name in ("SkipGateUp", "SkipDown")
            for number, case in enumerate(all_cases())
        ],
        sys.stdout,
    )
