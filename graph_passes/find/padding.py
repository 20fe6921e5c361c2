"""Whether a graph's attention takes sequences of a batch that are padded at their left."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.interface import KV_LENGTHS
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.spec.ops import MICROSOFT


def takes_left_padding(graph: ir.Graph) -> bool:
    """False where attention is told how many tokens a sequence has, not which of them count.

    ONNX Runtime's GroupQueryAttention reads lengths (`seqlens_k`), takes a sequence's first tokens for its own, and
    turns them by their place in it. A graph that is fed these lengths has runners that know.
    """
    if any(value.name == KV_LENGTHS for value in graph.inputs):
        return True
    return not any(is_op(node, "GroupQueryAttention", domain=MICROSOFT) for node in graph)
