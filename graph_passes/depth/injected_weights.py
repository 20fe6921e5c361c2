"""Weights of injected layers as lazy tensors: nothing is read before the model is saved."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

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


def _tensor(projection: Projection) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(projection.weight)
    assert tensor is not None, "projections end in constants"
    return tensor
