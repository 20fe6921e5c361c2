from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.spec.data_dependent_shapes import _SIZE_OPERANDS, data_dependent_shapes
from tests.graph_passes import golden_graphs

# x is data of shape [B, S]; `data` a number computed from it, `length` one computed from its shape.
_TEMPLATE = """<ir_version: 11, opset_import: ["" : 23, "dlo" : 1, "com.vendor" : 1]>
small (float[B,S] x, int64[1] given, bool flag{inputs}) => (y)
<int64[1] one = {{1}}, int64 zero = {{0}}, int64 unit = {{1}}, int64[2] both = {{1,1}}, float[1] half = {{0.5}},
 int64[2] off_on = {{0,1}}, bool yes = {{1}}>
{{ whole = Cast <to = 7> (x)
  data = ReduceMax <keepdims = 0> (whole)
  data_vector = Reshape (data, one)
  dims = Shape (x)
  tail = Gather (dims, one)
  length = Squeeze (tail)
  {nodes} }}"""


def _found(nodes: str, inputs: str = "") -> list[str]:
    return list(data_dependent_shapes(ir.from_onnx_text(_TEMPLATE.format(nodes=nodes, inputs=inputs)).graph))


SELECTING = {
    "NonZero": "y = NonZero (x)",
    "Compress": "y = Compress (x, flags)",
    "Unique": "y = Unique (x)",
}


@pytest.mark.parametrize("nodes", SELECTING.values(), ids=SELECTING)
def test_op_is_listed_when_its_output_selects_by_contents(nodes: str) -> None:
    (violation,) = _found(nodes, ", bool[S] flags")
    assert violation.endswith(": the shape of its output depends on the contents of its input")


# {number} and {vector} are where the size stands.
SIZED = {
    "ConstantOfShape": "y = ConstantOfShape ({vector})",
    "Expand": "y = Expand (half, {vector})",
    "OneHot": "y = OneHot (given, {vector}, off_on)",
    "Pad": "pads = Concat <axis = 0> (both, one, {vector})\n  y = Pad (x, pads)",
    "Range_start": "y = Range ({number}, zero, unit)",
    "Range_limit": "y = Range (zero, {number}, unit)",
    "Range_delta": "y = Range (zero, zero, {number})",
    "Reshape": "y = Reshape (x, {vector})",
    "Resize": "sizes = Concat <axis = 0> (one, {vector})\n  y = Resize (x, , , sizes)",
    "Slice_start": "y = Slice (x, {vector}, one)",
    "Slice_end": "y = Slice (x, one, {vector})",
    "Slice_axis": "y = Slice (x, one, one, {vector})",
    "Slice_step": "y = Slice (x, one, one, one, {vector})",
    "Split": "sizes = Concat <axis = 0> (one, {vector})\n  y, z = Split <axis = 1> (x, sizes)",
    "Squeeze": "y = Squeeze (x, {vector})",
    "Tile": "times = Concat <axis = 0> (one, {vector})\n  y = Tile (x, times)",
    "TopK": "y, z = TopK (x, {vector})",
    "Unsqueeze": "y = Unsqueeze (x, {vector})",
}


@pytest.mark.parametrize("name", SIZED)
def test_op_is_listed_only_when_its_size_is_computed_from_data(name: str) -> None:
    (violation,) = _found(SIZED[name].format(number="data", vector="data_vector"))
    assert name.partition("_")[0] in violation
    assert violation.endswith("which its output's shape follows from, is computed from tensor data")
    assert not _found(SIZED[name].format(number="length", vector="tail"))
    assert not _found(SIZED[name].format(number="unit", vector="one"))


def test_size_operands_are_what_onnx_calls_sizes() -> None:
    names = {
        onnx.defs.get_schema(op_type, 24).inputs[position].name
        for op_type, positions in _SIZE_OPERANDS.items()
        if op_type != "Upsample"  # deprecated: no schema of opset 24
        for position in positions
    }
    assert names == {
        *("K", "axes", "axis", "block_shape", "depth", "delta", "dft_length", "ends", "frame_length", "frame_step"),
        *("image_shape", "input", "limit", "num_mel_bins", "output_shape", "pads", "position", "repeats", "roi"),
        *("scales", "shape", "size", "sizes", "split", "start", "starts", "steps"),
    }


def test_size_is_data_when_it_mixes_shape_and_graph_input() -> None:
    assert _found("more = Add (tail, given)\n  y = Expand (half, more)")
    assert not _found("more = Add (tail, one)\n  y = Expand (half, more)")


def test_size_is_data_when_it_is_drawn_at_random() -> None:
    assert _found("r = RandomUniform <shape = [1]> ()\n  n = Cast <to = 7> (r)\n  y = Expand (half, n)")


def test_initializer_is_data_when_a_graph_input_may_override_it() -> None:
    text = _TEMPLATE.format(nodes="y = Expand (half, one)", inputs="")
    model = ir.from_onnx_text(text)
    assert not list(data_dependent_shapes(model.graph))
    model.graph.inputs.append(model.graph.initializers["one"])
    assert any("'one', which" in violation for violation in data_dependent_shapes(model.graph))


def test_foreign_domain_is_listed_and_plugin_op_is_not() -> None:
    (violation,) = _found("y = com.vendor.Anything (x)")
    assert violation.endswith("the shape rule of domain 'com.vendor' is unknown")
    assert not _found("y = dlo.SkipDown (x, x, x, x)")


IF = """y = If ({condition}) <then_branch = g1 () => (float[{then}] a) {{ a = {op} }},
  else_branch = g2 () => (float[{other}] b) {{ b = Neg (x) }}>"""


@pytest.mark.parametrize(
    ("condition", "then", "other", "reason"),
    [
        ("flag", "B,S", "B,S", None),
        ("flag", "B,T", "B,S", "its branches give 'y' the shapes ['B', 'T'] and ['B', 'S']"),
        ("flag", "B,S", "B", "its branches give 'y' the shapes ['B', 'S'] and ['B']"),
        ("yes", "B,T", "B,S", None),
    ],
)
def test_conditional_is_listed_only_when_branches_differ_in_shape_and_condition_is_data(
    condition: str, then: str, other: str, reason: str | None
) -> None:
    found = _found(IF.format(condition=condition, then=then, other=other, op="Abs (x)"))
    assert [violation.partition("': ")[2] for violation in found] == ([] if reason is None else [reason])


def test_node_is_listed_with_its_place_when_it_stands_in_a_branch() -> None:
    found = _found(IF.format(condition="flag", then="B,S", other="B,S", op="Expand (half, data_vector)"))
    (violation,) = found
    assert "Expand node" in violation
    assert "inside If node" in violation
    assert not _found(IF.format(condition="flag", then="B,S", other="B,S", op="Expand (half, dims)"))


LOOP = """y = Loop ({count}, yes, x) <body = g (int64 i, bool go, float[B,S] state) => (bool again, float[B,S] next)
  {{ next = Neg (state) again = {again} }}>"""


@pytest.mark.parametrize(
    ("count", "again", "listed"),
    [
        ("length", "Identity (go)", False),
        ("data", "Identity (go)", True),
        ("length", "Equal (data, i)", True),
    ],
)
def test_loop_is_listed_only_when_its_iterations_are_counted_from_data(count: str, again: str, listed: bool) -> None:
    found = _found(LOOP.format(count=count, again=again))
    assert [violation.endswith("number of iterations that is computed from tensor data") for violation in found] == (
        [True] if listed else []
    )


def test_only_the_compaction_is_listed_when_routed_llama_is_lowered() -> None:
    for name in ("route_layers", "lower_skip_to_if", "fuse_sibling_matmuls"):
        assert not list(data_dependent_shapes(golden_graphs.golden_graph(name).graph)), name
    (violation,) = data_dependent_shapes(golden_graphs.golden_graph("lower_skip_to_compaction").graph)
    assert violation.startswith("NonZero node 'model.routers.0.nonzero': ")
