"""Nodes of ONNX Runtime's own operators are what it declares, before anything is read from them."""

import onnx_ir as ir
import pytest

from dlo_export.exporter.sources.vendor_nodes import check_vendor_nodes, check_vendor_types
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.runtimes.onnxruntime.operators import own_operators

HEAD = (
    '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> agraph (float[2,3,4] x, float[4] w) => (float[N] y)'
)
GOOD = "{ y, m, v, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.1> (x, x, w) }"
WRONG = {
    "type": (GOOD.replace("0.1", '"0.1"'), "attribute epsilon is STRING, expected FLOAT"),
    "unknown attribute": (GOOD.replace("epsilon", "epsilom"), "no such attribute as epsilom"),
    "missing attribute": ("{ y = com.microsoft.MatMulNBits (x, w, w) }", "attribute K is missing"),
    "inputs": (GOOD.replace("(x, x, w)", "(x, x)"), "has 2 inputs, expected 3 to 4"),
    "operator": ("{ y = com.microsoft.Identity (x) }", "no such operator"),
    "in a branch": (
        "{ c = Constant <value = bool {1}> ()\n y = If (c) <then_branch = a () => (float[N] t) "
        "{ t = com.microsoft.Identity (x) }, else_branch = b () => (float[N] e) { e = Neg (x) }> }",
        "no such operator",
    ),
}


def test_nodes_are_taken_when_they_are_what_onnxruntime_declares() -> None:
    check_vendor_nodes(ir.from_onnx_text(f"{HEAD} {GOOD}"), for_inspection=False)
    assert own_operators()["MatMulNBits"].attributes["K"] == "INT"


@pytest.mark.parametrize(("body", "problem"), WRONG.values(), ids=WRONG)
def test_nodes_are_refused_by_name_when_they_are_not(body: str, problem: str) -> None:
    with pytest.raises(GraphPassError, match="not what the installed ONNX Runtime declares") as error:
        check_vendor_nodes(ir.from_onnx_text(f"{HEAD} {body}"), for_inspection=False)
    assert f": {problem}" in str(error.value)


TYPES = {
    "none of its own": ("float[4] w", "int64[4] w", "'w' is int64, expected bfloat16 or float or float16"),
    "another than the others": ("float[4] w", "float16[4] w", "'w' is float16, others of its type float"),
}


@pytest.mark.parametrize(("old", "new", "problem"), TYPES.values(), ids=TYPES)
def test_nodes_are_refused_when_they_read_values_of_other_types(old: str, new: str, problem: str) -> None:
    check_vendor_types(ir.from_onnx_text(f"{HEAD} {GOOD}"))
    with pytest.raises(GraphPassError) as error:
        check_vendor_types(ir.from_onnx_text(f"{HEAD} {GOOD}".replace(old, new)))
    assert problem in str(error.value)


def test_weights_are_refused_when_they_are_not_of_the_shape_that_attributes_say() -> None:
    weights = f"<uint8[4,1,16] b = {{{', '.join('0' * 64)}}}, float[4,1,1] s = {{1, 1, 1, 1}}>"
    body = "{ y = com.microsoft.MatMulNBits <K = 32, N = 4, block_size = 32> (x, b, s) }"
    with pytest.raises(GraphPassError, match=r"its weight has scales \[4, 1, 1\], expected \[4\] or \[4, 1\]"):
        check_vendor_types(ir.from_onnx_text(f"{HEAD} {weights} {body}"))


def test_what_a_newer_onnxruntime_may_know_is_let_pass_when_a_graph_is_only_looked_at() -> None:
    for name in ("operator", "unknown attribute"):
        check_vendor_nodes(ir.from_onnx_text(f"{HEAD} {WRONG[name][0]}"), for_inspection=True)


def test_graph_is_refused_when_it_imports_another_version_of_the_domain() -> None:
    model = ir.from_onnx_text(f"{HEAD} {GOOD}")
    model.graph.opset_imports["com.microsoft"] = 2
    with pytest.raises(GraphPassError, match=r"imports version 2 of com\.microsoft"):
        check_vendor_nodes(model, for_inspection=False)
