"""Element types behind operators of ONNX Runtime's, which ONNX's inference knows nothing of."""

import onnx_ir as ir

from dlo_export.exporter.sources.graph_types import infer_types
from dlo_export.exporter.sources.shared_types import complete_types

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g (float16[2,32] x, bool c) => (float16[2,4] y)'
PRODUCT = "com.microsoft.MatMulNBits <K = 32, N = 4, block_size = 32>"
WEIGHTS = f"<uint8[4,1,16] b = {{{', '.join('0' * 64)}}}, float16[4] s = {{1, 1, 1, 1}}>"


def _types(body: str, annotated: str = "") -> dict[str, ir.DataType | None]:
    model = ir.from_onnx_text(f"{HEAD} {WEIGHTS[:-1]}{annotated}> {body}")
    infer_types(model)
    return {output.name: output.dtype for node in model.graph for output in node.outputs}


def test_types_go_on_behind_an_operator_that_onnx_does_not_know() -> None:
    found = _types(f"{{ p = {PRODUCT} (x, b, s)\n q = Neg (p)\n less = Less (q, p)\n y = Identity (q) }}")
    assert [found[name] for name in ("p", "q", "less")] == [ir.DataType.FLOAT16] * 2 + [ir.DataType.BOOL]


def test_declaration_counts_when_the_graph_says_another_type() -> None:
    assert _types(f"{{ p = {PRODUCT} (x, b, s)\n y = Neg (p) }}", ", float[2,4] p")["p"] == ir.DataType.FLOAT16


def test_nothing_is_made_up_when_each_output_may_be_of_another_type() -> None:
    body = "b (int64 i, bool go, bool v, float16[2,32] w) => (bool go, bool v, float16[2,32] w) { }"
    model = ir.from_onnx_text(f"{HEAD} {{ u, y = Loop <body = {body}> (, c, c, x) }}")
    complete_types(model.graph)
    assert model.graph[0].outputs[0].dtype is None
