"""What is taken out of a graph with a node, and what stays."""

import onnx_ir as ir

from dlo_export.graph_passes.rewriting import remove_with_sources


def test_source_stays_when_another_of_its_outputs_is_the_graphs() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[4] x) => (float[2] kept, float[4] y) {
            kept, halved = Split<axis=0, num_outputs=2>(x)
            unread = Neg(halved)
            y = Abs(x)
        }
    """)
    graph = model.graph
    remove_with_sources(graph, graph[1])
    assert [node.op_type for node in graph] == ["Split", "Abs"]
