"""Whether an execution provider has the kernels that a graph needs."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.runtimes.onnxruntime.providers import Provider


def why_not_run(model: ir.Model, dtype: str, provider: Provider) -> str | None:
    """Why a graph cannot run on a provider; None where nothing is known against it.

    Args:
        model: With its subgraphs.
        dtype: "fp32", "fp16" or "bf16", of its weights and activations.
        provider: Whose gaps count.
    """
    reductions = {
        f"{node.op_type}({node.attributes['reduction'].as_string()})"
        for node in model.graph.all_nodes()
        if "reduction" in node.attributes
    }
    return provider.why_not_run(BY_OPTION[dtype], reductions)
