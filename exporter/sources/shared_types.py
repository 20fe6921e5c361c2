"""Element types behind operators that ONNX does not know: an output's is that of the inputs which share its letter."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import onnx
import onnx_ir as ir

from dlo_export.runtimes.onnxruntime.operators import declared_by_onnxruntime


class _Letters(NamedTuple):
    """Of an operator's inputs and outputs: those that share one are of one type; "" stands for any type."""

    inputs: Sequence[str]
    outputs: Sequence[str]


def complete_types(graph: ir.Graph) -> None:
    """Gives values the element type that follows from their operators' declarations.

    ONNX's own inference stops behind an operator of ONNX Runtime's, and at what is computed from it. What the graph
    says of such an operator's outputs gives way to the declaration.

    Args:
        graph: Its nodes in order; those inside subgraphs are left as they are.
    """
    version = graph.opset_imports.get("", 0)
    for node in graph:
        own = declared_by_onnxruntime(node.domain, node.op_type)
        if own is not None:
            letters: _Letters | None = _Letters([letter for letter, _ in own.input_types], own.output_letters)
        else:
            letters = None if node.domain else _declared_by_onnx(node.op_type, version)
        for output, dtype in () if letters is None else _types(node, letters):
            if own is not None or output.dtype is None:
                output.type = ir.TensorType(dtype)


def _types(node: ir.Node, letters: _Letters) -> Iterator[tuple[ir.Value, ir.DataType]]:
    """Outputs whose type an input tells."""
    known = {
        letter: value.dtype
        for letter, value in zip(_for_each(letters.inputs, node.inputs), node.inputs, strict=True)
        if letter and value is not None and value.dtype is not None
    }
    for letter, output in zip(_for_each(letters.outputs, node.outputs), node.outputs, strict=True):
        if letter in known and not output.is_graph_output():
            yield output, known[letter]


def _for_each(letters: Sequence[str], values: Sequence[object]) -> Sequence[str]:
    """The last one stands for all that follow, where an operator takes or gives any number."""
    return [*letters, *[*letters[-1:]] * len(values)][: len(values)]


@functools.cache
def _declared_by_onnx(op_type: str, version: int) -> _Letters | None:
    try:
        schema = onnx.defs.get_schema(op_type, version)
    except onnx.defs.SchemaError:
        return None  # ONNX's checker has told of it
    inputs, outputs = (
        [each.type_str if each.is_homogeneous else "" for each in parameters]
        for parameters in (schema.inputs, schema.outputs)
    )
    return _Letters(inputs, outputs)
