"""What a `--dtype` is in a graph."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION, FLOAT16


def graph_dtype(option: str) -> ir.DataType:
    """onnx_ir's type of "fp32", "fp16" or "bf16"."""
    return ir.DataType.from_numpy(BY_OPTION[option].numpy)


def sixteen_bits(stored: str) -> str:
    """The type that a GPU gets unless another one is asked for.

    Args:
        stored: That of most of the source's weights, such as "bfloat16".

    Returns:
        "fp16" or "bf16", which cannot overflow where the source's own type did not.
    """
    return "fp16" if stored == FLOAT16.name else "bf16"
