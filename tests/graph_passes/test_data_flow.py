from __future__ import annotations

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.find.data_flow import (
    behind,
    constant_integers,
    constant_scalar,
    constant_tensor,
    consumed_values,
    element_type,
    is_constant,
    node_order,
    nodes_between,
    pass_through_values,
    producer_of,
    rank,
)

TEXT = """<ir_version: 11, opset_import: ["" : 23]>
tiny (float[B,2] x, bool c, float[2] given) => (float[B,2] y, float[B,2] z)
<float[2,3] w = {1,2,3,4,5,6}, int64[1] one = {1}, float half = {0.5}, float[2] given = {1,2}>
{ n = Identity (w)
  t = Transpose <perm = [1, 0]> (n)
  k = Constant <value_ints = [4, -5]> ()
  a = Cast <to = 10> (x)
  b = Identity (a)
  s = Shape (x)
  p = Mul (x, half)
  q = If (c) <then_branch = f () => (o) {o = Neg (p)}, else_branch = g () => (r) {r = Neg (x)}>
  y = Add (q, x)
  z = Add (x, given) }"""


@pytest.fixture
def graph() -> ir.Graph:
    return ir.from_onnx_text(TEXT).graph


def _value(graph: ir.Graph, name: str) -> ir.Value:
    inner = [output for node in graph for output in node.outputs]
    return next(value for value in (*graph.inputs, *graph.initializers.values(), *inner) if value.name == name)


def _names(nodes: tuple[ir.Node, ...]) -> list[str | None]:
    return [node.outputs[0].name for node in nodes]


def test_captured_values_are_read_when_a_node_holds_subgraphs(graph: ir.Graph) -> None:
    node = _value(graph, "q").producer()
    assert node is not None
    assert [value.name for value in consumed_values(node)] == ["c", "p", "x"]


def test_value_passes_through_casts_and_identities_when_they_follow_each_other(graph: ir.Graph) -> None:
    assert [value.name for value in pass_through_values(_value(graph, "x"))] == ["x", "a", "b"]


def test_paths_are_found_through_captures_and_around_what_is_excluded(graph: ir.Graph) -> None:
    x, y, z, p = (_value(graph, name) for name in "xyzp")
    order = node_order(graph)
    assert _names(nodes_between(order, [x], [y])) == ["p", "q", "y"]
    assert _names(nodes_between(order, [p], [y])) == ["q", "y"]
    assert _names(nodes_between(order, [x], [y], [p.producer()])) == ["q", "y"]  # type: ignore[list-item]
    assert _names(nodes_between(order, [p], [z])) == []
    assert nodes_between(order, [x], [x]) == ()


def test_constants_are_told_from_defaults_that_callers_may_replace(graph: ir.Graph) -> None:
    found = {name: constant_tensor(_value(graph, name)) is not None for name in ("w", "n", "t", "k", "x", "given")}
    assert found == {"w": True, "n": True, "t": False, "k": True, "x": False, "given": False}
    assert is_constant(_value(graph, "t"))
    assert not is_constant(_value(graph, "b"))
    assert not is_constant(_value(graph, "given"))
    assert not is_constant(None)


def test_contents_are_given_only_when_of_the_kind_asked_for(graph: ir.Graph) -> None:
    assert constant_scalar(_value(graph, "half")) == 0.5
    assert constant_scalar(_value(graph, "one")) == 1.0
    assert constant_scalar(_value(graph, "w")) is None
    assert constant_integers(_value(graph, "k")) == (4, -5)
    assert constant_integers(_value(graph, "half")) is None
    assert constant_integers(None) is None


def test_type_and_rank_are_unknown_when_nothing_says_them(graph: ir.Graph) -> None:
    types = {name: element_type(_value(graph, name)) for name in ("b", "p", "s", "q")}
    assert types == {"b": ir.DataType.FLOAT16, "p": ir.DataType.FLOAT, "s": None, "q": None}
    assert [rank(_value(graph, name)) for name in ("w", "x", "p")] == [2, 2, None]


def test_what_a_value_is_made_of_is_found_behind_the_ops_that_are_asked_for(graph: ir.Graph) -> None:
    x, a, b = (_value(graph, name) for name in "xab")
    assert behind(b, "Cast", "Identity") is x
    assert behind(b, "Identity") is a
    assert behind(b, "Cast") is b
    assert (behind(None, "Cast"), producer_of(None), producer_of(x)) == (None, None, None)
