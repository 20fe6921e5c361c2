"""Weights behind a DequantizeLinear: ONNX's own form of quantised matrices, by block or by output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import LazyTensor, rows_at_once
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import constant_tensor, is_op
from dlo_export.graph_passes.weights.block_codes import BlockCodes, dequantize, quantize
from dlo_export.graph_passes.weights.dense import new_constant
from dlo_export.graph_passes.weights.storage import Place, Replacements, UniqueName, WeightStorage

_CODES, _SCALES, _ZERO_POINTS = 0, 1, 2
_PARTS = {_CODES: "codes", _SCALES: "scales", _ZERO_POINTS: "zero_points"}
_TYPES = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8}


class DequantizedStorage(WeightStorage):
    """A matrix that a DequantizeLinear computes from constants.

    Its codes are those of `block_codes`: signed ones are shifted by the middle of their range.

    Args:
        at: Where the matrix enters.
        node: The DequantizeLinear; between it and `at` may stand Identity, Cast and Transpose.
        layout: How the codes lie: "in_out" or "out_in".

    Attributes:
        bits: Of a code.
        block: Inputs that share a scale; all of them where each output has one.

    Raises:
        GraphPassError: It is scaled in a way that is not understood.
    """

    def __init__(self, at: Place, node: ir.Node, layout: Literal["in_out", "out_in"]) -> None:
        inputs = [*node.inputs, None, None][:3]
        tensors = [constant_tensor(value) for value in inputs]
        codes, scales, zero_points = tensors
        known = all(tensor is not None or value is None for value, tensor in zip(inputs, tensors, strict=True))
        if codes is None or scales is None or not known or codes.dtype not in _TYPES or len(codes.shape) != 2:
            raise GraphPassError(
                f"{place(node)}: dequantises no constant matrix of 4 or 8 bits",
                hint="export the graph with weights of 4 or 8 bits, or unquantised",
            )
        shape, of_scales = codes.shape.numpy(), scales.shape.numpy()
        in_axis = 0 if layout == "in_out" else 1
        axis, block = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0)
        rows, columns = shape[1 - in_axis], shape[in_axis]
        blocks = -(-columns // block) if block > 0 else 0
        by_block = axis == in_axis and block > 0 and of_scales == ((blocks, rows) if in_axis == 0 else (rows, blocks))
        by_row = axis != in_axis and not block and of_scales == (rows,)
        signed = codes.dtype in (ir.DataType.INT4, ir.DataType.INT8)
        if (not by_block and not by_row) or (zero_points is None and not signed):
            raise GraphPassError(
                f"{place(node)}: scales {list(of_scales)} along axis {axis} do not scale blocks of inputs, or outputs, "
                f"of a matrix {list(shape)}",
                hint="quantise the graph by blocks of inputs, or by output, with zero points where codes are unsigned",
            )
        if zero_points is not None and zero_points.shape.numpy() != of_scales:
            raise GraphPassError(
                f"{place(node)}: zero points {list(zero_points.shape.numpy())} are not one for each of the scales "
                f"{list(of_scales)}",
                hint="quantise the graph again",
            )
        super().__init__(at.node, (rows, columns), scales.dtype)
        self._at, self._in_out = at, layout == "in_out"
        self.bits = 4 if codes.dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8
        self.block = block if by_block else columns
        self._shift = 1 << (self.bits - 1) if signed else 0
        self._tensors = {_CODES: codes, _SCALES: scales}
        if zero_points is not None:
            self._tensors[_ZERO_POINTS] = zero_points
        self._constants = {index: value for index, value in enumerate(inputs) if value is not None}

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        """Codes, scales and, where there are any, zero points."""
        return tuple(self._constants.values())

    @property
    def form(self) -> str:
        """Bits and size of a block, and that they are dequantised by a node of their own."""
        blocks = "by output" if self.block == self.shape[1] else f"in blocks of {self.block}"
        return f"{self.bits} bits {blocks} (DequantizeLinear)"

    @property
    def is_symmetric(self) -> bool:
        """Whether the middle code stands for zero everywhere."""
        return _ZERO_POINTS not in self._tensors

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Dequantised."""
        return dequantize(self.codes(start, stop), self.shape[1])

    def codes(self, start: int, stop: int) -> BlockCodes:
        """Of some outputs, unsigned; what fills up the last block of a row is the middle code."""
        stop = min(stop, self.shape[0])
        blocks = -(-self.shape[1] // self.block)
        padded = np.full((stop - start, blocks * self.block), 1 << (self.bits - 1), np.uint8)
        padded[:, : self.shape[1]] = self._part(_CODES, start, stop).astype(np.int16) + self._shift
        scales = self._part(_SCALES, start, stop).reshape(stop - start, blocks)
        zero_points = np.full(scales.shape, self._shift, np.uint8)
        if not self.is_symmetric:
            shifted = self._part(_ZERO_POINTS, start, stop).astype(np.int16) + self._shift
            zero_points = shifted.reshape(scales.shape).astype(np.uint8)
        return BlockCodes(padded.reshape(stop - start, blocks, self.block), scales, zero_points)

    def _part(self, index: int, start: int, stop: int) -> np.ndarray:
        """Of some outputs, one row each."""
        array = self._tensors[index].numpy()
        return array.T[start:stop] if self._in_out or array.ndim == 1 else array[start:stop]

    def stored_alike(self, name: str, source: LazyTensor, unique: UniqueName) -> Replacements:
        """Quantised in blocks of the same size, with zero points where this weight has them."""
        found = {}
        for index, old in self._constants.items():
            tensor = _QuantizedPart(
                unique(f"{name}.{_PARTS[index]}"), self._tensors[index], self._compute(index, source)
            )
            found[old] = new_constant(tensor)
        return {self._at: found}

    def _compute(self, index: int, source: LazyTensor) -> Callable[[], np.ndarray]:
        """A part of the quantised contents, as the DequantizeLinear reads it."""

        def compute() -> np.ndarray:
            step = rows_at_once(source.shape[0], source.nbytes)
            parts = [self._quantized(index, source, start, start + step) for start in range(0, source.shape[0], step)]
            whole = np.concatenate(parts)
            shaped = whole if self._tensors[index].shape.numpy() != (len(whole),) else whole.reshape(-1)
            return np.ascontiguousarray(shaped.T if self._in_out else shaped)

        return compute

    def _quantized(self, index: int, source: LazyTensor, start: int, stop: int) -> np.ndarray:
        rows = np.asarray(source.rows(start, stop), np.float32)
        source.release()
        symmetric, scale_type = self.is_symmetric, self._tensors[_SCALES].dtype.numpy()
        stored = quantize(rows, bits=self.bits, block=self.block, scale_type=scale_type, symmetric=symmetric)
        if index == _SCALES:
            return stored.scales
        numbers = (
            stored.zero_points if index == _ZERO_POINTS else stored.codes.reshape(len(rows), -1)[:, : rows.shape[1]]
        )
        return (numbers.astype(np.int16) - self._shift).astype(self._tensors[index].dtype.numpy())


class _QuantizedPart(ir.LazyTensor):
    """A part of a quantised matrix, computed when it is written: a quarter, or an eighth, of the matrix in memory."""

    def __init__(self, name: str, like: ir.TensorProtocol, compute: Callable[[], np.ndarray]) -> None:
        shape = ir.Shape(like.shape.numpy())
        super().__init__(lambda: ir.Tensor(compute(), dtype=like.dtype, name=name), like.dtype, shape, name=name)


def dequantized_storage(at: Place, layout: Literal["in_out", "out_in"]) -> DequantizedStorage | None:
    """The matrix that a node reads at a place from a DequantizeLinear of constants; None where there is none.

    Args:
        at: Of the node.
        layout: In which the node reads it.

    Raises:
        GraphPassError: It is such a matrix, scaled in a way that is not understood.
    """
    value = at.value
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if is_op(node, "DequantizeLinear"):
            return DequantizedStorage(at, node, layout) if constant_tensor(node.inputs[0]) is not None else None
        if not is_op(node, "Identity", "Cast", "Transpose"):
            return None
        if is_op(node, "Transpose"):
            layout = "out_in" if layout == "in_out" else "in_out"
        value = node.inputs[0]
    return None
