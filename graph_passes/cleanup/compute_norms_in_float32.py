"""Compute RMS norms in float32 in a 16-bit graph."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.find.data_flow import element_type, is_op
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY

_SIXTEEN_BIT = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclasses.dataclass(frozen=True)
class ComputeNormsInFloat32Pass(GraphPass):
    """Cast what an RMS norm reads to float32, and its result back.

    RMSNormalization's stash_type asks for float32 inside, but not every runtime heeds it, and the mean of squares of a
    residual stream overflows float16 from 256 on (a Llama's stream reaches thousands) and loses most of bfloat16's
    eight bits.

    Before::

        y = RMSNormalization(x, scale)

    After::

        y = Cast(RMSNormalization(Cast(x, float32), Cast(scale, float32)), dtype)

    Optional: a float32 graph is left alone. Scope: main graph.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (InjectLayersPass,)
    nodes_from: ClassVar[Border | None] = "injected"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every norm that reads a 16-bit value."""
        norms = [
            node
            for node in model.graph
            if is_op(node, "RMSNormalization") and element_type(_operand(node, 0)) in _SIXTEEN_BIT
        ]
        for node in norms:
            _rewrite(model.graph, node)
        return bool(norms)


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, "RMSNormalization has two inputs"
    return value


def _rewrite(graph: ir.Graph, norm: ir.Node) -> None:
    stream, scale, output = _operand(norm, 0), _operand(norm, 1), norm.outputs[0]
    dtype, name = element_type(stream), norm.name or output.name
    assert dtype is not None, "chosen by its type"
    # The norm keeps its place and name; casts go around it, on the stream and on its weight.
    for index, (value, part) in enumerate(((stream, "input"), (scale, "scale"))):
        cast = _cast(value, ir.DataType.FLOAT, f"{name}.{part}_float")
        graph.insert_before(norm, cast)
        norm.replace_input_with(index, cast.outputs[0])
    back = _cast(output, dtype, f"{name}.rounded")
    graph.insert_after(norm, back)
    output.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
    back.replace_input_with(0, output)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    # Whoever looks for the norm's value finds the rounded one.
    output.name, back.outputs[0].name = f"{name}.float", output.name


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    made_by = {PASS_KEY: ComputeNormsInFloat32Pass.__name__}
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name, metadata_props=made_by)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    node.outputs[0].shape = value.shape
    return node
