"""Tables that tokens' rows are looked up in: dense, of one scale, or quantised by blocks and shared with the head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import LazyTensor, TensorOfRows
from dlo_export.graph_passes.find.data_flow import behind, constant_tensor, is_op, producer_of
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.weights.block_codes import BlockCodes, dequantize, unpack
from dlo_export.graph_passes.weights.dense import dense_storage
from dlo_export.graph_passes.weights.storage import Place, StoredRows


class QuantizedTable(TensorOfRows):
    """The table of ONNX Runtime's GatherBlockQuantized, its codes packed in bytes, as a checkpoint's tensor.

    Args:
        codes: uint8 of any shape that holds all codes row by row.
        scales: [rows, blocks].
        zero_points: uint8, packed along its rows; None where the middle code is zero.
        bits: Of a code.
        block: Columns that share a scale.
    """

    def __init__(
        self,
        codes: ir.TensorProtocol,
        scales: ir.TensorProtocol,
        zero_points: ir.TensorProtocol | None,
        *,
        bits: int,
        block: int,
    ) -> None:
        self._codes, self._scales, self._zero_points = codes, scales, zero_points
        self._bits, self._block = bits, block
        rows, self._blocks = scales.shape.numpy()
        self.shape: tuple[int, ...] = (rows, codes.size * 8 // bits // rows)
        self.dtype: np.dtype = scales.dtype.numpy()

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows, dequantised."""
        rows, columns = self.shape
        stop = min(stop, rows)
        stored = np.asarray(self._codes.numpy()).reshape(rows, -1)[start:stop]
        codes = np.zeros((stop - start, self._blocks * self._block), np.uint8)
        codes[:, :columns] = unpack(stored, self._bits, columns)
        scales = self._scales.numpy()[start:stop]
        zero_points = np.full(scales.shape, 1 << (self._bits - 1), np.uint8)
        if self._zero_points is not None:
            packed = np.asarray(self._zero_points.numpy()).reshape(rows, -1)[start:stop]
            zero_points = unpack(packed, self._bits, self._blocks)
        return dequantize(BlockCodes(codes.reshape(*scales.shape, -1), scales, zero_points), columns)


class ScaledTable(TensorOfRows):
    """A table of integers, all of one scale, as a checkpoint's tensor.

    Args:
        codes: [rows, columns].
        scale: Of one element.
        zero_point: Of one element, of the codes' type; None for zero.
    """

    def __init__(
        self, codes: ir.TensorProtocol, scale: ir.TensorProtocol, zero_point: ir.TensorProtocol | None
    ) -> None:
        self._codes = codes
        self.shape: tuple[int, ...] = tuple(codes.shape.numpy())
        self.dtype: np.dtype = scale.dtype.numpy()
        self._scale = np.float32(scale.numpy().reshape(()))
        self._zero_point = 0 if zero_point is None else int(zero_point.numpy().reshape(()))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows, dequantised."""
        codes = np.asarray(self._codes.numpy()[start:stop], np.float32)
        return ((codes - self._zero_point) * self._scale).astype(self.dtype)


def dequantized_rows(lookup: ir.Node) -> ir.Value | None:
    """What a DequantizeLinear makes of the integers that a Gather looks up, where nothing else reads them."""
    readers = lookup.outputs[0].consumers()
    if not is_op(lookup, "Gather") or len(readers) != 1 or not is_op(readers[0], "DequantizeLinear"):
        return None
    return readers[0].outputs[0]


def embedding_table(lookup: ir.Node) -> LazyTensor | None:
    """The constant [rows, columns] that a node looks up rows of; None for every other node.

    What is quantised in a way that is not understood is none either: then no stream starts at the node.
    """
    if is_op(lookup, "Gather") and lookup.attributes.get_int("axis", 0) == 0:
        dense = dense_storage(Place(lookup, 0), "out_in")
        return _scaled_table(lookup) if dense is None else StoredRows(dense, 0, dense.shape[0])
    if is_op(lookup, "GatherBlockQuantized", domain=MICROSOFT):
        return _quantized_table(lookup)
    return None


def _scaled_table(lookup: ir.Node) -> ScaledTable | None:
    """Of what ONNX Runtime's dynamic quantisation makes of an embedding."""
    rows, codes = dequantized_rows(lookup), constant_tensor(lookup.inputs[0])
    node = producer_of(rows)
    if node is None or codes is None or len(codes.shape) != 2:
        return None
    scale, zero_point = (constant_tensor(value) for value in (*node.inputs[1:], None)[:2])
    alone = [tensor.size == 1 for tensor in (scale, zero_point) if tensor is not None]
    if scale is None or not all(alone) or codes.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return None
    return ScaledTable(codes, scale, zero_point)


def _quantized_table(lookup: ir.Node) -> QuantizedTable | None:
    bits, block = lookup.attributes.get_int("bits", 4), lookup.attributes.get_int("block_size", 128)
    axes = lookup.attributes.get_int("gather_axis", 0), lookup.attributes.get_int("quantize_axis", 1)
    given = [*lookup.inputs, None][:4]
    codes, scales, zero_points = _packed_codes(given[0]), constant_tensor(given[2]), constant_tensor(given[3])
    if codes is None or scales is None or (given[3] is not None and zero_points is None):
        return None
    understood = axes == (0, 1) and bits in (4, 8) and block >= 16 and len(scales.shape) == 2
    if not understood or codes.dtype != ir.DataType.UINT8 or not scales.dtype.is_floating_point():
        return None
    rows, blocks = scales.shape.numpy()
    # The last block of a row need not be full.
    columns, left = divmod(codes.size * 8 // bits, rows) if rows else (0, 1)
    whole = not left and -(-columns // block) == blocks
    if zero_points is not None:
        whole = whole and zero_points.dtype == ir.DataType.UINT8 and zero_points.size == rows * -(-blocks * bits // 8)
    return QuantizedTable(codes, scales, zero_points, bits=bits, block=block) if whole else None


def _packed_codes(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Bytes that a head may share, in another shape."""
    return constant_tensor(behind(value, "Reshape"))
