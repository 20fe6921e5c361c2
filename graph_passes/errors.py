"""What a graph pass raises when the graph or the request is not what it needs."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError

_FORM = (
    "expected a decoder-only model with a KV cache, each layer attention and then an MLP, as optimum "
    "(--task text-generation-with-past) exports one"
)


class GraphPassError(InputError, ir.passes.PreconditionError):
    """A graph does not have the form a pass needs, or a request does not fit the graph.

    A `PreconditionError` too, so that onnx_ir's own pass runner passes it on unwrapped.
    """


class DecoderLayersNotFound(GraphPassError):  # noqa: N818 - says what happened, as FileNotFoundError's family does
    """The residual stream could not be followed from the embedding to the last layer.

    Args:
        message: Where it ended, and what was expected there.
        hint: What to do about it, where that is not the same as for all graphs.
    """

    def __init__(self, message: str, *, hint: str = _FORM) -> None:
        super().__init__(message, hint=hint)


def place(node: ir.Node) -> str:
    """Where in the graph: op type and name of a node, for messages."""
    domain = f"{node.domain}::" if node.domain else ""
    return f"{domain}{node.op_type} node '{node.name}'"
