"""Weights stored as they are computed with: one constant, either way round."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.graph_passes.checkpoint_weight import CheckpointWeight
from dlo_export.graph_passes.find.data_flow import constant_behind, constant_tensor
from dlo_export.graph_passes.weights.storage import Place, Replacements, UniqueName, WeightStorage

Layout = Literal["in_out", "out_in", "vector"]


class DenseStorage(WeightStorage):
    """One constant; between it and the node may stand Identity, Cast and Transpose.

    Args:
        place: Where it enters.
        constant: The constant itself.
        layout: How it is stored: "out_in" as in a checkpoint, "in_out" as a MatMul reads it, or "vector".

    Attributes:
        place: As given.
        layout: As given.
    """

    def __init__(self, place: Place, constant: ir.Value, layout: Layout) -> None:
        tensor = constant_tensor(constant)
        assert tensor is not None, "callers have seen that it is constant"
        shape = tuple(int(dim) for dim in tensor.shape.numpy())
        super().__init__(place.node, shape[::-1] if layout == "in_out" else shape, tensor.dtype)
        self.place = place
        self.layout = layout
        self._constant = constant
        self._tensor = tensor

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        """The one."""
        return (self._constant,)

    @property
    def form(self) -> str:
        """Its element type."""
        return self.dtype.name.lower()

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A view of the mapped tensor."""
        array = self._tensor.numpy()
        return (array.T if self.layout == "in_out" else array)[start:stop]

    def stored_alike(self, name: str, source: LazyTensor, unique: UniqueName) -> Replacements:
        """In the same layout and element type."""
        tensor = CheckpointWeight(unique(name), source, self.dtype, transposed=self.layout == "in_out")
        return {self.place: {self._constant: new_constant(tensor)}}


def dense_storage(place: Place, layout: Layout) -> DenseStorage | None:
    """The constant that a node reads at a place, of two dimensions or, as a vector, one; None where there is none.

    Args:
        place: Of the node.
        layout: In which the node reads it.
    """
    found = constant_behind(place.value)
    tensor = None if found is None else constant_tensor(found[0])
    if found is None or tensor is None or not tensor.dtype.is_floating_point():
        return None
    if len(tensor.shape) != (1 if layout == "vector" else 2):
        return None
    constant, transposes = found
    if transposes % 2 and layout != "vector":
        layout = "out_in" if layout == "in_out" else "in_out"
    return DenseStorage(place, constant, layout)


def new_constant(tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer to be, of the tensor's name."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
