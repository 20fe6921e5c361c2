"""Appends named nodes and initializers to an onnx_ir graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class GraphBuilder:
    """Writes nodes into one graph; a node and its first output share a name.

    Args:
        graph: The graph that grows.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._tape = ir.tape.Tape(graph)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Adds a graph input."""
        value = ir.val(name, dtype=dtype, shape=shape)
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Makes a value a graph output of the declared type and shape."""
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self.graph.outputs.append(value)

    def constant(self, name: str, value: np.ndarray | np.generic | float) -> ir.Value:
        """A small initializer; the one of that name where it exists already."""
        existing = self.graph.initializers.get(name)
        return existing if existing is not None else self.weight(ir.tensor(np.asarray(value), name=name))

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer holding a tensor, under the tensor's name."""
        return self._tape.initializer(tensor)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Adds a node with one output.

        Args:
            op_type: ONNX operator of the default domain.
            inputs: None for an optional input left out.
            name: Of the node and its output.
            dtype: Of the output; that of the first input unless given.
            **attributes: The operator's attributes.
        """
        value = self._tape.op(op_type, inputs, attributes or None, name=name)
        value.name = name
        kept = dtype or (inputs[0].dtype if inputs and inputs[0] is not None else None)
        if kept is not None:
            value.type = ir.TensorType(kept)
        return value

    def op_outputs(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        **attributes: int | float | str | Sequence[int],
    ) -> Sequence[ir.Value]:
        """Adds a node with several outputs, all of the first input's type; it is named after the first."""
        values = self._tape.op_multi_out(op_type, inputs, attributes or None, num_outputs=len(names), name=names[0])
        for value, name in zip(values, names, strict=True):
            value.name = name
            if inputs[0] is not None:
                value.type = inputs[0].type
        return values
