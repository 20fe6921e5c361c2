"""Weights of ONNX Runtime's MatMulNBits: packed codes, scales and zero points by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import constant_tensor
from dlo_export.graph_passes.row_tensor import RowTensor
from dlo_export.graph_passes.weights.block_codes import BlockCodes, dequantize, pack, quantize, unpack
from dlo_export.graph_passes.weights.dense import new_constant
from dlo_export.graph_passes.weights.dequantize_linear import DequantizedStorage
from dlo_export.graph_passes.weights.storage import Place, Replacements, UniqueName, WeightStorage

_CODES, _SCALES, _ZERO_POINTS, _GROUP_INDEX, BIAS = 1, 2, 3, 4, 5
_PARTS = {_CODES: "codes", _SCALES: "scales", _ZERO_POINTS: "zero_points"}
EIGHT_BIT_ACTIVATIONS = 4
"""The `accuracy_level` that lets MatMulNBits round to 8 bits what it multiplies by the codes."""
_ATTRIBUTES = frozenset({"K", "N", "bits", "block_size", "accuracy_level"})


class NBitsStorage(WeightStorage):
    """The weight of a MatMulNBits node.

    Args:
        node: The node.

    Raises:
        GraphPassError: Its weight is stored in a way that is not understood, or its parts contradict each other.
    """

    def __init__(self, node: ir.Node) -> None:
        columns, rows = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
        self._bits, self._block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
        inputs = [*node.inputs, *[None] * (BIAS + 1 - len(node.inputs))]
        tensors = {index: constant_tensor(inputs[index]) for index in (_CODES, _SCALES, _ZERO_POINTS)}
        problems = [f"attribute {name}" for name in node.attributes if name not in _ATTRIBUTES]
        problems += ["a group index"] if inputs[_GROUP_INDEX] is not None else []
        problems += [] if self._bits in (2, 4, 8) and self._block >= 16 else [f"{self._bits} bits in {self._block}s"]
        missing = [
            index for index in (_CODES, _SCALES, _ZERO_POINTS) if inputs[index] is not None and tensors[index] is None
        ]
        problems += ["parts that are no constants"] if missing or tensors[_CODES] is None else []
        codes, scales, zero_points = tensors.values()
        if problems or codes is None or scales is None:
            raise GraphPassError(
                f"{place(node)}: its weight has {', '.join(problems)}; expected codes of 2, 4 or 8 bits and scales",
                hint="export the graph with weights that are not prepacked or reordered",
            )
        self._blocks = -(-columns // self._block)
        self._codes, self._scales, self._zero_points = codes, scales, zero_points
        self._values = {index: value for index in tensors if (value := inputs[index]) is not None}
        kinds = [] if codes.dtype == ir.DataType.UINT8 else [f"{codes.dtype.name} codes"]
        kinds += [] if scales.dtype.is_floating_point() else [f"{scales.dtype.name} scales"]
        if zero_points is not None and zero_points.dtype not in (ir.DataType.UINT8, scales.dtype):
            kinds.append(f"{zero_points.dtype.name} zero points")
        if wrong := [*part_problems(node), *kinds]:
            raise GraphPassError(f"{place(node)}: its weight has {'; '.join(wrong)}", hint="export the graph again")
        super().__init__(node, (rows, columns), scales.dtype)

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        """Codes, scales and, where blocks have them, zero points."""
        return tuple(self._values.values())

    @property
    def form(self) -> str:
        """Bits and size of a block."""
        return f"{self._bits} bits in blocks of {self._block}"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Dequantised."""
        stop = min(stop, self.shape[0])
        codes = _by_row(self._codes, self.shape[0])[start:stop].reshape(stop - start, self._blocks, -1)
        scales = _by_row(self._scales, self.shape[0])[start:stop]
        if self._zero_points is None:
            zero_points = np.full(scales.shape, 1 << (self._bits - 1), np.uint8)
        else:
            zero_points = _by_row(self._zero_points, self.shape[0])[start:stop]
            if zero_points.dtype == np.uint8:
                zero_points = unpack(zero_points, self._bits, self._blocks)
        return dequantize(BlockCodes(unpack(codes, self._bits, self._block), scales, zero_points), self.shape[1])

    def stored_alike(self, name: str, source: LazyTensor, unique: UniqueName) -> Replacements:
        """Quantised in blocks of the same size, with zero points where this weight has them."""

        def quantized(start: int, stop: int) -> BlockCodes:
            rows = np.asarray(source.rows(start, stop), np.float32)
            source.release()
            scale_type, symmetric = self._scales.dtype.numpy(), self._zero_points is None
            return quantize(rows, bits=self._bits, block=self._block, scale_type=scale_type, symmetric=symmetric)

        def zero_points(start: int, stop: int) -> np.ndarray:
            found = quantized(start, stop).zero_points
            floating = self._zero_points is not None and self._zero_points.dtype != ir.DataType.UINT8
            return found.astype(self._scales.dtype.numpy()) if floating else pack(found, self._bits)

        parts = {
            _CODES: lambda start, stop: pack(quantized(start, stop).codes, self._bits),
            _SCALES: lambda start, stop: quantized(start, stop).scales,
            _ZERO_POINTS: zero_points,
        }
        found = {}
        for index, old in self._values.items():
            like = constant_tensor(old)
            assert like is not None, "seen before"
            shape = tuple(int(dim) for dim in like.shape.numpy())
            tensor = _RowParts(unique(f"{name}.{_PARTS[index]}"), like.dtype, shape, self.shape[0], parts[index])
            found[Place(self.node, index)] = {old: new_constant(tensor)}
        return found


def packed_codes(name: str, weight: DequantizedStorage, unique: UniqueName) -> tuple[ir.Value, ...]:
    """A matrix that a DequantizeLinear computes, as a MatMulNBits node reads it: the same numbers, nothing rounded.

    Args:
        name: Of the constants, which add what they are.
        weight: The matrix, its blocks of at least 16 inputs.
        unique: Makes a name unique in the graph.

    Returns:
        Inputs of the node behind its first one, as new constants: lazy, and in no graph yet.
    """
    (rows, columns), bits, block = weight.shape, weight.bits, weight.block
    blocks = -(-columns // block)

    def whole(index: int, dtype: ir.DataType, compute: Callable[[BlockCodes], np.ndarray], width: int) -> ir.Value:
        # No row tensor: what writes it looks whether its numbers are finite, as at all of somebody else's.
        part = unique(f"{name}.{_PARTS[index]}")
        made = lambda: ir.Tensor(compute(weight.codes(0, rows)), dtype=dtype, name=part)  # noqa: E731
        return new_constant(ir.LazyTensor(made, dtype, ir.Shape((rows, width)), name=part))

    codes = _RowParts(
        unique(f"{name}.{_PARTS[_CODES]}"),
        ir.DataType.UINT8,
        (rows, blocks, block * bits // 8),
        rows,
        lambda start, stop: pack(weight.codes(start, stop).codes, bits),
    )
    parts = [new_constant(codes), whole(_SCALES, weight.dtype, lambda stored: stored.scales, blocks)]
    if not weight.is_symmetric:
        width = -(-blocks * bits // 8)
        parts.append(whole(_ZERO_POINTS, ir.DataType.UINT8, lambda stored: pack(stored.zero_points, bits), width))
    return tuple(parts)


def part_problems(node: ir.Node) -> Iterator[str]:
    """Constant parts of a MatMulNBits node that are not of the shape its attributes say.

    ONNX Runtime looks at them when it packs the weight, and its type inference does not.
    """
    columns, rows = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    if block < 1 or not _ATTRIBUTES.issuperset(node.attributes):
        return  # another form, such as one that was packed before
    blocks = -(-columns // block)
    given = [*node.inputs, *[None] * BIAS][:BIAS]
    zero_points = constant_tensor(given[_ZERO_POINTS])
    packed = zero_points is not None and zero_points.dtype == ir.DataType.UINT8
    width = -(-blocks * bits // 8) if packed else blocks
    expected: dict[str, tuple[int, list[tuple[int, ...]]]] = {
        "codes": (_CODES, [(rows, blocks, block * bits // 8)]),
        "scales": (_SCALES, [(rows * blocks,), (rows, blocks)]),
        "zero points": (_ZERO_POINTS, [(rows * width,), (rows, width)]),
    }
    for name, (index, shapes) in expected.items():
        tensor = constant_tensor(given[index])
        if tensor is not None and (found := tuple(tensor.shape.numpy())) not in shapes:
            yield f"{name} {list(found)}, expected {' or '.join(str(list(shape)) for shape in shapes)}"


class _RowParts(RowTensor):
    """A part of a quantised weight: whatever its shape, so many elements for every row of the weight."""

    def __init__(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        rows: int,
        compute: Callable[[int, int], np.ndarray],
    ) -> None:
        # Scales may be stored in one long row: then a row of the weight is so many of its elements.
        super().__init__(name, dtype, shape, row_block=max(1, shape[0] // max(1, rows)))
        self._compute = compute

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        del out
        first, last = start // self.row_block, -(-stop // self.row_block)
        found = self._compute(first, last)
        return np.ascontiguousarray(found).reshape(stop - start, *self.shape.numpy()[1:])


def _by_row(tensor: ir.TensorProtocol, rows: int) -> np.ndarray:
    return np.asarray(tensor.numpy()).reshape(rows, -1)
