from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.naming import (
    free_interface_names,
    make_node_names_unique,
    make_value_names_unique,
    unique_names,
)

TEXT = """<ir_version: 11, opset_import: ["" : 23]>
tiny (float[2] x, bool c) => (float[2] logits)
<float[2] w = {1,2}>
{ [first] a = Add (x, w)
  b = If (c) <then_branch = t () => (o) {o = Neg (a)}, else_branch = e () => (p) {p = Identity (a)}>
  logits = Add (a, b) }"""


def _graph() -> ir.Graph:
    return ir.from_onnx_text(TEXT).graph


def test_name_is_numbered_when_taken_anywhere_even_in_a_subgraph() -> None:
    unique = unique_names(_graph())
    assert [unique(name) for name in ("x", "w", "o", "first", "new", "new", "new")] == [
        *("x_1", "w_1", "o_1", "first_1"),
        *("new", "new_1", "new_2"),
    ]


def test_values_are_renamed_when_another_visible_one_has_the_name() -> None:
    graph = _graph()
    assert not make_value_names_unique(graph)
    graph.node("first").outputs[0].name = "x"  # the input keeps it
    holder = next(node for node in graph if node.op_type == "If")
    inner = holder.attributes["then_branch"].as_graph()
    inner.outputs[0].name = "w"  # the initializer around it keeps it
    assert make_value_names_unique(graph)
    assert [value.name for value in graph.inputs] == ["x", "c"]
    assert (graph.node("first").outputs[0].name, inner.outputs[0].name) == ("x_1", "w_1")
    assert not make_value_names_unique(graph)


def test_both_branches_may_use_a_name_when_neither_sees_the_other() -> None:
    graph = ir.from_onnx_text(TEXT.replace("(p) {p =", "(o) {o =")).graph
    assert not make_value_names_unique(graph)


def test_inner_values_give_up_the_interfaces_names_when_they_are_not_its_own() -> None:
    text = TEXT.replace(" w", ' "past_key_values.1.key"').replace("(o) {o", '("hidden.3") {"hidden.3"')
    graph = ir.from_onnx_text(text).graph
    assert free_interface_names(graph)
    assert list(graph.initializers) == ["past_key_values.1.key.inner"]
    holder = next(node for node in graph if node.op_type == "If")
    assert holder.attributes["then_branch"].as_graph().outputs[0].name == "hidden.3.inner"
    assert graph.outputs[0].name == "logits"
    assert not free_interface_names(graph)


def test_nodes_get_names_of_their_own_when_they_have_none_or_share_one() -> None:
    graph = _graph()
    graph[-1].name = "first"
    assert make_node_names_unique(graph)
    assert [node.name for node in graph] == ["first", "If", "first_1"]
    assert len({node.name for node in graph.all_nodes()}) == 5
    assert not make_node_names_unique(graph)
