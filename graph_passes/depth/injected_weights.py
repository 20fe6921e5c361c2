"""Weights of injected layers as lazy tensors: nothing is computed before the model is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.depth.layer_init import init_tensor, needs_previous
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.graph_passes.checkpoint_weight import CheckpointWeight
from dlo_export.graph_passes.find.projections import Projection

WeightSource = np.ndarray | LazyTensor


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
    tensor = ArrayTensor(source) if isinstance(source, np.ndarray) else source
    return CheckpointWeight(name, tensor, _tensor(like).dtype, transposed=like.layout == "in_out")


def initial_weight(
    name: str,
    init: str,
    source: Projection,
    previous: Projection | None,
    *,
    seed: Sequence[int],
    initializer_range: float,
) -> ir.LazyTensor:
    """A weight derived from the source layer's by `layer_init.init_tensor`.

    Args:
        name: Of the new initializer.
        init: One of `layer_init.LAYER_INITS`.
        source: The same role's weight in the source layer.
        previous: And in the layer before it, None for the first layer.
        seed: Of init "random".
        initializer_range: Likewise.
    """

    def compute() -> np.ndarray:
        before = _contents(previous) if previous is not None and needs_previous(init) else None
        return init_tensor(
            init, source.tensor, _contents(source), before, seed=seed, initializer_range=initializer_range
        )

    return _lazy(name, source, compute)


def _lazy(name: str, like: Projection, compute: Callable[[], np.ndarray]) -> ir.LazyTensor:
    dtype, shape = _tensor(like).dtype, _tensor(like).shape.numpy()

    def evaluate() -> ir.TensorProtocol:
        array = _oriented(np.asarray(compute()), like).astype(dtype.numpy(), copy=False)
        return ir.tensor(np.ascontiguousarray(array), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def _contents(projection: Projection) -> np.ndarray:
    return _oriented(_tensor(projection).numpy(), projection)


def _oriented(array: np.ndarray, projection: Projection) -> np.ndarray:
    """From checkpoint orientation to the graph's or back: the same transposition."""
    return array.T if projection.layout == "in_out" else array


def _tensor(projection: Projection) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(projection.weight)
    assert tensor is not None, "projections end in constants"
    return tensor
