"""Weights of injected layers as lazy tensors: nothing is computed before the model is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.find.projections import Projection


@runtime_checkable
class LazyArray(Protocol):
    """An array that is read on request, such as a checkpoint's tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    def numpy(self) -> np.ndarray:
        """Its contents."""
        ...


WeightSource = np.ndarray | LazyArray


def checkpoint_shape(projection: Projection) -> tuple[int, ...]:
    """Shape of a weight as a checkpoint stores it, [out, in]."""
    shape = tuple(int(dim) for dim in _tensor(projection).shape.numpy())
    return shape[::-1] if projection.layout == "in_out" else shape


def given_weight(name: str, like: Projection, source: WeightSource) -> ir.LazyTensor:
    """A weight from outside, in the layout and element type of the projection it stands in for.

    Args:
        name: Of the new initializer.
        like: The projection of the source layer.
        source: Contents in checkpoint orientation.
    """
    return _lazy(name, like, lambda: source if isinstance(source, np.ndarray) else source.numpy())


def _lazy(name: str, like: Projection, compute: Callable[[], np.ndarray]) -> ir.LazyTensor:
    dtype, shape = _tensor(like).dtype, _tensor(like).shape.numpy()

    def evaluate() -> ir.TensorProtocol:
        array = _oriented(np.asarray(compute()), like).astype(dtype.numpy(), copy=False)
        return ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def _oriented(array: np.ndarray, projection: Projection) -> np.ndarray:
    """From checkpoint orientation to the graph's or back: the same transposition."""
    return array.T if projection.layout == "in_out" else array


def _tensor(projection: Projection) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(projection.weight)
    assert tensor is not None, "projections end in constants"
    return tensor
