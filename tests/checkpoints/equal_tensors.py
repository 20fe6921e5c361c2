"""A checkpoint's tensors against those that transformers reads."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from dlo_export.checkpoints.opening import Checkpoint


def check_equals_transformers(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Every tensor, bit by bit, and what it says of itself before it is read.

    Args:
        checkpoint: As we read it.
        model: Of the same file, in float32.
    """
    reference = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert set(reference) == set(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        array = tensor.numpy()
        assert (tensor.shape, tensor.dtype, tensor.nbytes) == (array.shape, array.dtype, array.nbytes)
        np.testing.assert_array_equal(array.astype(np.float32), reference[name], err_msg=name)
