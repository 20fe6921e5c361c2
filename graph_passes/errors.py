"""What a graph pass raises when the graph or the request is not what it needs."""

from __future__ import annotations

import onnx_ir as ir


class GraphPassError(ir.passes.PreconditionError, ValueError):
    """A graph does not have the form a pass needs, or a request does not fit the graph.

    Both a `PreconditionError`, so that onnx_ir's own pass runner passes it on unwrapped, and a `ValueError`, so that a
    command line may map it to "bad input".

    Args:
        message: Who, what was found (node, value, layer), what was expected.
        hint: What to do about it, one line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n\nhint: {hint}")


class DecoderLayersNotFound(GraphPassError):  # noqa: N818 - says what happened, as FileNotFoundError's family does
    """The residual stream could not be followed from the embedding to the last layer."""


def place(node: ir.Node) -> str:
    """Where in the graph: op type and name of a node, for messages."""
    domain = f"{node.domain}::" if node.domain else ""
    return f"{domain}{node.op_type} node '{node.name}'"
