"""Numbers of a few bits, a scale for every block of a row: the arithmetic of block-wise quantisation.

Codes are unsigned and a value is (code - zero point) * scale, as ONNX Runtime's MatMulNBits has it. Rounding is that of
its quantiser (`MlasQuantizeBlockwise`), so that what was quantised once keeps its codes when it is quantised again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class BlockCodes(NamedTuple):
    """Quantised rows.

    Attributes:
        codes: uint8 [rows, blocks, block].
        scales: [rows, blocks].
        zero_points: uint8 [rows, blocks].
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


def quantize(rows: np.ndarray, *, bits: int, block: int, scale_type: np.dtype, symmetric: bool) -> BlockCodes:
    """Quantises rows block by block; the last block of a row is filled up with zeros.

    Args:
        rows: Float [rows, columns].
        bits: Of a code, at most 8.
        block: Columns that share a scale.
        scale_type: What scales are stored as; codes are made for the stored ones.
        symmetric: Zero is the middle code; else each block has a zero point of its own.
    """
    count, columns = rows.shape
    blocks = -(-columns // block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    values = padded.reshape(count, blocks, block)
    lowest, highest = values.min(-1), values.max(-1)
    middle, largest = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        # The value farthest from zero gets code 0, the one code without a counterpart.
        scales = (np.where(np.abs(highest) > np.abs(lowest), highest, lowest) / -middle).astype(scale_type)
        zero_points = np.full(scales.shape, middle, np.uint8)
    else:
        # Zero lies between them, so that zeros stay zeros.
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        scales = ((highest - lowest) / largest).astype(scale_type)
        zero_points = np.clip(_rounded(-lowest * _reciprocal(scales)), 0, largest).astype(np.uint8)
    codes = _rounded(values * _reciprocal(scales)[..., np.newaxis] + zero_points[..., np.newaxis])
    return BlockCodes(np.clip(codes, 0, largest).astype(np.uint8), scales, zero_points)


def dequantize(stored: BlockCodes, columns: int) -> np.ndarray:
    """The rows [rows, columns], of the scales' type.

    Args:
        stored: What `quantize` made; zero points may be of the scales' type too.
        columns: What fills up the last block is left out.
    """
    offsets = stored.codes.astype(np.float32) - stored.zero_points[..., np.newaxis].astype(np.float32)
    values = offsets * stored.scales[..., np.newaxis].astype(np.float32)
    return values.reshape(len(values), -1)[:, :columns].astype(stored.scales.dtype)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of codes along the last axis, the first code of a byte in its lowest bits; filled up with zeros."""
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    grouped = filled.reshape(*filled.shape[:-1], -1, per_byte)
    packed = np.zeros(grouped.shape[:-1], np.uint8)
    for number in range(per_byte):
        packed |= grouped[..., number] << (bits * number)
    return packed


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of the last axis, uint8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., np.newaxis] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def _reciprocal(scales: np.ndarray) -> np.ndarray:
    """Of a block of zeros, whose scale is zero, zero."""
    wide = scales.astype(np.float32)
    return np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To the nearest, halves away from zero, as C rounds."""
    rounded: np.ndarray = np.copysign(np.floor(np.abs(values) + 0.5), values)
    return rounded
