"""Transposed copies at the speed of memory."""

from __future__ import annotations

import numpy as np

# A block, and a strip of cache lines in it, stay in a core's caches. Rows of matrices mostly lie a power of two apart,
# and a column of those is in the same few places of a cache: the block's rows are padded by some cache lines.
BLOCK_ROWS, _COLUMNS, _PADDING = 256, 512, 32


def transpose_into(out: np.ndarray, matrix: np.ndarray) -> None:
    """Writes a matrix transposed, and cast where the types differ.

    Args:
        out: [columns, rows]; any strides, any type.
        matrix: [rows, columns], any strides, any type.
    """
    # Moved as integers where it can be: NumPy asks bfloat16's own code for every element.
    bits = np.dtype(f"u{out.dtype.itemsize}")
    if matrix.dtype == out.dtype:
        out, matrix = out.view(bits), matrix.view(bits)
    if matrix.strides[0] < matrix.strides[1]:
        out[:] = matrix.T  # its rows lie as the result's: there is nothing to turn
        return
    rows, columns = matrix.shape
    memory = np.empty((min(rows, BLOCK_ROWS), min(columns, _COLUMNS) + _PADDING), out.dtype)
    turned, out = memory.view(bits).T, out.view(bits)
    for row in range(0, rows, BLOCK_ROWS):
        for column in range(0, columns, _COLUMNS):
            part = matrix[row : row + BLOCK_ROWS, column : column + _COLUMNS]
            memory[: part.shape[0], : part.shape[1]] = part
            out[column : column + _COLUMNS, row : row + BLOCK_ROWS] = turned[: part.shape[1], : part.shape[0]]
