"""Give a tied head a product that takes tokens as they are, where reshaping its logits would copy them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import constant_tensor, is_op, producer_of
from dlo_export.graph_passes.rewriting import remove_with_sources, replace_value
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes


@dataclasses.dataclass(frozen=True)
class MultiplyTiedHeadPass(GraphPass):
    """Replace a Gemm between two Reshapes by a MatMul with the transposed embeddings.

    Before::

        rows   = Reshape(normed, [-1, hidden])
        scores = Gemm <transB = 1> (rows, embeddings)          # [batch · sequence, vocab]
        logits = Reshape(scores, Concat(Shape(normed)[:2], vocab))

    After::

        columns = Transpose(embeddings)                        # [hidden, vocab]
        logits  = MatMul(normed, columns)                      # [batch, sequence, vocab]

    ONNX Runtime gives graph outputs memory of their own, so that a Reshape in front of one copies: 25 MB for a prompt
    of 128 tokens and a vocabulary of 49,152. On a CPU it folds the Transpose at load, packs the product's operand as it
    does that of Gemm, and keeps neither the folded matrix nor more memory; a GPU would keep both matrices. Optional: a
    graph whose head is another, or that goes on computing with what the Reshape gives, is left alone. Scope: main
    graph. Source: ONNX Runtime 1.32's allocation planner.
    """

    nodes_from: ClassVar[Border | None] = "injected"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite the head."""
        graph = model.graph
        heads = [(value, head) for value in graph.outputs if (head := _tied_head(value)) is not None]
        for logits, (normed, embeddings) in heads:
            reshape, new = logits.producer(), TaggedNodes(self._name, None)
            assert reshape is not None, "asked by _tied_head"
            dtype, shape = embeddings.dtype, None if embeddings.shape is None else embeddings.shape.dims[::-1]
            columns = new.add("Transpose", embeddings, name="lm_head.columns", dtype=dtype, shape=shape, perm=(1, 0))
            scores = new.add("MatMul", normed, columns, name="lm_head.logits", dtype=dtype, shape=logits.shape)
            graph.insert_before(reshape, new.nodes)
            replace_value(logits, scores)
            remove_with_sources(graph, reshape)
        return bool(heads)


def _tied_head(logits: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """What a head reads, and the matrix [vocab, hidden]; None where it is none of a Gemm between Reshapes."""
    # From behind: the Reshape that gives the axes back, the product of rows, the Reshape that made them.
    behind = _producer(logits, "Reshape")
    gemm = None if behind is None else _producer(behind.inputs[0], "Gemm")
    before = None if gemm is None else _producer(gemm.inputs[0], "Reshape")
    if behind is None or gemm is None or before is None or len(gemm.inputs) != 2:
        return None
    normed, matrix = before.inputs[0], gemm.inputs[1]
    tensor, attributes = constant_tensor(matrix), gemm.attributes
    if normed is None or matrix is None or tensor is None or attributes.get_float("alpha", 1.0) != 1.0:
        return None
    vocabulary, hidden = tensor.shape.numpy()
    if (attributes.get_int("transA", 0), attributes.get_int("transB", 0)) != (0, 1):
        return None
    # Rows are tokens, and every token gets its place back.
    shape = _producer(behind.inputs[1], "Concat")
    tokens = None if shape is None else _producer(shape.inputs[0], "Shape")
    if shape is None or tokens is None or tokens.inputs[0] is not normed or len(shape.inputs) != 2:
        return None
    places = (tokens.attributes.get_int("start", 0), tokens.attributes.get_int("end", -1))
    alike = places == (0, 2) and _is(before.inputs[1], -1, hidden) and _is(shape.inputs[1], vocabulary)
    return (normed, matrix) if alike else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = producer_of(value)
    return node if is_op(node, op_type) else None


def _is(value: ir.Value | None, *numbers: int) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.numpy().tolist() == list(numbers)
