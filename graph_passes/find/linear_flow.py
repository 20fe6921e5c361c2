"""Which columns of which matrices a value was computed from: how projections are told apart, packed ones too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import SHAPE_OPS, constant_integers, is_op, producer_of, rank
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.weights.dense import dense_storage
from dlo_export.graph_passes.weights.linear import linear_weight
from dlo_export.graph_passes.weights.storage import Place, WeightStorage

# Attention ops that take query, key, value as inputs 0, 1, 2 and return the present key and value as outputs 1, 2.
ATTENTION_OPS = (("", "Attention"), (MICROSOFT, "GroupQueryAttention"), (MICROSOFT, "MultiHeadAttention"))


class Part(NamedTuple):
    """Columns `start:stop` of what a matrix computes, which are its rows [out, in] in a checkpoint.

    A matrix may hold several projections side by side.
    """

    matrix: WeightStorage
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether it is all that the matrix computes."""
        return (self.start, self.stop) == (0, self.matrix.shape[0])


class LinearFlow:
    """A block's matrices, and for every value the parts of them it was computed from most directly.

    Args:
        nodes: Of the block, in topological order.

    Attributes:
        matrices: In order.

    Raises:
        GraphPassError: A matrix is stored in a way that is not understood.
    """

    def __init__(self, nodes: Iterable[ir.Node]) -> None:
        self.matrices: list[WeightStorage] = []
        self._nearest: dict[ir.Value, frozenset[Part]] = {}
        # Values whose last axis is just such columns, so that cutting it cuts them.
        self._columns: dict[ir.Value, Part] = {}
        # A value carries the parts it comes from through everything that is not linear itself; shapes carry nothing.
        for node in nodes:
            if is_op(node, *SHAPE_OPS):
                continue
            if (matrix := linear_weight(node)) is not None:
                self.matrices.append(matrix)
                self._set(node.outputs[0], Part(matrix, 0, matrix.shape[0]))
            elif (node.domain, node.op_type) in ATTENTION_OPS:
                self._trace_attention(node)
            elif not self._trace_columns(node):
                self._nearest.update(dict.fromkeys(node.outputs, self.union(node.inputs)))

    def of(self, value: ir.Value) -> frozenset[Part]:
        """Parts that a value comes from, no other matrix of the block in between."""
        return self._nearest.get(value, frozenset())

    def union(self, values: Iterable[ir.Value | None]) -> frozenset[Part]:
        """Parts that any of the values comes from."""
        return frozenset().union(*(self.of(value) for value in values if value is not None))

    def first_without(self, taken: Iterable[Part]) -> frozenset[Part]:
        """What is left of the matrices that no other one of the block feeds, when parts of them have their role."""
        found = []
        for matrix in self.matrices:
            if self.union(matrix.node.inputs):
                continue
            others = sorted((part.start, part.stop) for part in taken if part.matrix is matrix)
            borders = [0, *itertools.chain.from_iterable(others), matrix.shape[0]]
            gaps = zip(borders[::2], borders[1::2], strict=True)
            found += [Part(matrix, start, stop) for start, stop in gaps if start < stop]
        return frozenset(found)

    def _set(self, value: ir.Value, part: Part) -> None:
        self._nearest[value], self._columns[value] = frozenset({part}), part

    def _columns_of(self, value: ir.Value | None) -> Part | None:
        return None if value is None else self._columns.get(value)

    def _trace_columns(self, node: ir.Node) -> bool:
        """What keeps columns apart: casts, biases, other leading axes, and what cuts them."""
        part = self._columns_of(node.inputs[0]) if node.inputs else None
        if is_op(node, "Add"):
            operands = [(self._columns_of(value), Place(node, 1 - index)) for index, value in enumerate(node.inputs)]
            biased = [each for each, other in operands if each is not None and dense_storage(other, "vector")]
            part = biased[0] if biased else None
        elif is_op(node, "Split"):
            sizes = None if part is None else _split_sizes(node, part)
            if part is None or sizes is None:
                return False
            start = part.start
            for output, size in zip(node.outputs, sizes, strict=True):
                self._set(output, Part(part.matrix, start, start + size))
                start += size
            return True
        elif is_op(node, "Slice"):
            part = None if part is None else _slice_of(node, part)
        elif is_op(node, "Reshape"):
            # A Gemm takes tokens in one axis; behind it they are in two again.
            part = part if part is not None and _last_size(node.inputs[1]) == part.stop - part.start else None
        elif not is_op(node, "Identity", "Cast"):
            return False
        if part is None:
            return False
        self._set(node.outputs[0], part)
        return True

    def _trace_attention(self, node: ir.Node) -> None:
        """Each present output comes from its own input only; packed inputs lie side by side in the first."""
        query, key, value = (*node.inputs, None, None)[:3]
        packed = self._packed_inputs(node) if key is None and value is None else None
        if packed is not None:
            for output, parts in zip(node.outputs, packed, strict=False):
                self._nearest[output] = parts
            return
        key, value = key or query, value or query
        for output, sources in zip(node.outputs, ((query, key, value), (key,), (value,)), strict=False):
            self._nearest[output] = self.union(sources)

    def _packed_inputs(self, node: ir.Node) -> tuple[frozenset[Part], ...] | None:
        """Where queries, keys and values are columns of one matrix: all of them, the keys', the values'."""
        part = self._columns_of(node.inputs[0])
        heads, kv_heads = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
        if part is None or not heads or not kv_heads or (part.stop - part.start) % (heads + 2 * kv_heads):
            return None
        head = (part.stop - part.start) // (heads + 2 * kv_heads)
        keys, values = part.start + heads * head, part.start + (heads + kv_heads) * head
        of_keys, of_values = Part(part.matrix, keys, values), Part(part.matrix, values, part.stop)
        return frozenset({part}), frozenset({of_keys}), frozenset({of_values})


def _is_last_axis(axis: int, value: ir.Value | None) -> bool:
    known = None if value is None else rank(value)
    return axis == -1 or (known is not None and axis == known - 1)


def _split_sizes(node: ir.Node, part: Part) -> Sequence[int] | None:
    if not _is_last_axis(node.attributes.get_int("axis", 0), node.inputs[0]):
        return None
    width, count = part.stop - part.start, len(node.outputs)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = constant_integers(node.inputs[1])
    else:
        chunk = -(-width // count)
        sizes = tuple(min(chunk, width - start) for start in range(0, width, chunk))
    return sizes if sizes is not None and len(sizes) == count and sum(sizes) == width else None


def _last_size(shape: ir.Value | None) -> int | None:
    """The last dimension of a shape, where that is constant."""
    node = producer_of(shape)
    if is_op(node, "Concat") and node.inputs:
        shape = node.inputs[-1]
    sizes = constant_integers(shape)
    return sizes[-1] if sizes else None


def _slice_of(node: ir.Node, part: Part) -> Part | None:
    starts, ends, axes, steps = (constant_integers(value) for value in (*node.inputs[1:], None, None, None, None)[:4])
    if starts is None or ends is None or axes is None or len(axes) != 1 or steps not in (None, (1,)):
        return None
    if not _is_last_axis(axes[0], node.inputs[0]):
        return None
    start, stop, _ = slice(starts[0], ends[0]).indices(part.stop - part.start)
    return Part(part.matrix, part.start + start, part.start + stop) if start < stop else None
