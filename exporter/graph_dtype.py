"""What a `--dtype` is in a graph."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION


def graph_dtype(option: str) -> ir.DataType:
    """onnx_ir's type of "fp32", "fp16" or "bf16"."""
    return ir.DataType.from_numpy(BY_OPTION[option].numpy)
