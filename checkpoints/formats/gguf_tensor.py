"""Tensors of a GGUF file: stored as floats, or in quantised blocks that are dequantised when they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from dlo_export.checkpoints.dtypes import FLOAT32, FLOATS, ElementType
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.lazy_tensors import TensorOfRows

FLOAT_TYPES: dict[str, ElementType] = {kind.safetensors: kind for kind in FLOATS}
# What gguf.quants dequantises. NVFP4 is left out: the scales of its tensors are tensors of their own.
QUANTISED_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)
# Elements dequantised together: as many as the intermediate arrays, several times that, stay in a core's cache.
DEQUANTISED_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class GgufTensor(TensorOfRows):
    """A tensor of a GGUF file.

    Attributes:
        shape: Row-major: the reverse of the order in the file.
        file: Where its bytes are.
        offset: Of its first byte in the file.
        stored_type: A key of FLOAT_TYPES or one of QUANTISED_TYPES.
        row_order: int64 [shape[0]], the stored row of each row, None where they are stored in order.
    """

    shape: tuple[int, ...]
    file: MappedFile
    offset: int
    stored_type: str
    row_order: np.ndarray | None = field(default=None, compare=False)

    @property
    def dtype(self) -> np.dtype:
        """float32 for quantised tensors, else the stored type."""
        return FLOAT_TYPES.get(self.stored_type, FLOAT32).numpy

    @property
    def stored_nbytes(self) -> int:
        """Size in the file in bytes."""
        return prod(self.shape) // self.block_columns * self._block_bytes

    @property
    def block_columns(self) -> int:
        """Elements of a row that are quantised together; 1 where it is stored as floats."""
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.stored_type]][0]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`, dequantised; a view of the file where they are stored as floats in this order."""
        stored = self._stored_rows(slice(start, stop))
        return stored if self.stored_type in FLOAT_TYPES else self._dequantised(stored)

    def part(self, rows: slice, columns: slice) -> np.ndarray:
        """numpy()[rows, columns] of a matrix, dequantising only the blocks that these elements lie in."""
        stored = self._stored_rows(rows)
        if self.stored_type in FLOAT_TYPES:
            return stored[:, columns]
        start, stop, _ = columns.indices(self.shape[-1])
        first, last = start // self.block_columns, -(-stop // self.block_columns)
        blocks = stored[:, first * self._block_bytes : last * self._block_bytes]
        offset = first * self.block_columns
        return self._dequantised(blocks)[:, start - offset : stop - offset]

    def release(self) -> None:
        """Gives the pages of the file back; reading the tensor again is allowed and slow."""
        self.file.release(self.offset, self.stored_nbytes)

    @property
    def _block_bytes(self) -> int:
        return GGML_QUANT_SIZES[GGMLQuantizationType[self.stored_type]][1]

    def _stored_rows(self, rows: slice) -> np.ndarray:
        """The file's elements, or the bytes of its blocks, of some rows."""
        dtype, shape = self.dtype, self.shape
        if self.stored_type not in FLOAT_TYPES:
            dtype = np.dtype(np.uint8)
            shape = (*self.shape[:-1], self.shape[-1] // self.block_columns * self._block_bytes)
        stored = self.file.array(self.offset, dtype, shape)
        return stored[rows] if self.row_order is None else stored[self.row_order[rows]]

    def _dequantised(self, stored: np.ndarray) -> np.ndarray:
        """The float32 elements of whole blocks, [..., bytes] in, [..., elements] out."""
        blocks = stored.reshape(-1, self._block_bytes)
        elements = np.empty((len(blocks), self.block_columns), np.float32)
        step = DEQUANTISED_AT_ONCE // self.block_columns
        for start in range(0, len(blocks), step):
            # As one long row: the package goes through an array by sixteen rows, whose number says nothing here.
            row = blocks[start : start + step].reshape(1, -1)
            piece = dequantize(row, GGMLQuantizationType[self.stored_type])
            elements[start : start + step] = piece.reshape(-1, self.block_columns)
        return elements.reshape(*stored.shape[:-1], -1)
