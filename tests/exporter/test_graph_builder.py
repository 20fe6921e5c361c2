"""Nodes and constants that the builder writes."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from dlo_export.exporter.plain_graph.graph_builder import GraphBuilder


def test_graph_computes_what_was_written():
    graph = ir.Graph([], [], nodes=[], name="built", opset_imports={"": 23})
    builder = GraphBuilder(graph)
    x = builder.input("x", ir.DataType.FLOAT, ["n", 4])
    two = builder.constant("two", np.float32(2))
    assert builder.constant("two", np.float32(3)) is two, "a name has one constant, the first"
    doubled = builder.op("Mul", [x, two], "doubled")
    left, right = builder.op_outputs("Split", [doubled], ["left", "right"], axis=1, num_outputs=2)
    whole = builder.op("Cast", [builder.op("Add", [left, right], "sum")], "whole", dtype=ir.DataType.INT64, to=7)
    builder.output(whole, ir.DataType.INT64, ["n", 2])

    assert [node.name for node in graph] == ["doubled", "left", "sum", "whole"]
    assert (doubled.dtype, right.dtype, whole.dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT64)
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.arange(8, dtype=np.float32).reshape(2, 4)})
    assert result.tolist() == [[4, 8], [20, 24]]
