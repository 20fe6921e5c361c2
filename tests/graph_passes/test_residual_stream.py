from __future__ import annotations

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.errors import DecoderLayersNotFound
from dlo_export.graph_passes.find.data_flow import node_order, subgraphs_of
from dlo_export.graph_passes.find.residual_stream import ResidualBlock, embedding_values, residual_blocks
from tests.graph_passes.golden_graphs import golden_graph

# `{body}` is what follows the embedding x, [batch, sequence, 2].
TEMPLATE = """<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>
tiny (int64[B,S] ids, bool skip) => (float[B,S,2] y)
<float[4,2] table = {{1,2,-3,1,2,-1,0.5,-2}}, float[2] norm = {{1,0.5}}, float half = {{0.5}}>
{{ x = Gather (table, ids)
  {body} }}"""


def _blocks(body: str) -> tuple[ResidualBlock, ...]:
    graph = ir.from_onnx_text(TEMPLATE.format(body=body)).graph
    (root,) = embedding_values(graph)
    return residual_blocks(node_order(graph), root)


@pytest.mark.parametrize(
    ("lookup", "found"),
    [
        ("e = Gather (table, ids)", ["e"]),
        ("i = Cast <to = 6> (ids)\n  e = Gather (table, i)", ["e"]),
        ("e = Gather (row, ids)", []),  # a table of positions has a row's rank
        ("s = Shape (ids)\n  e = Gather (table, s)", []),  # computed, so no tokens
        ("i = Cast <to = 7> (numbers)\n  e = Gather (table, i)", []),
        ("t = Mul (table, table)\n  e = Gather (t, ids)", []),
    ],
    ids=["plain", "cast", "row", "shape", "floats", "computed_table"],
)
def test_embedding_is_found_only_when_a_table_is_read_by_integer_inputs(lookup: str, found: list[str]) -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
    tiny (int64[B,S] ids, float[B,S] numbers) => (float y)
    <float[4,2] table = {{1,2,3,4,5,6,7,8}}, float[2] row = {{1,2}}> {{ {lookup}\n y = ReduceSum (e) }}"""
    assert [value.name for value in embedding_values(ir.from_onnx_text(text).graph)] == found


def test_blocks_follow_each_other_when_operands_are_swapped_and_the_stream_is_cast() -> None:
    first, second = _blocks(
        "a = Sigmoid (x)\n  h = Add (a, x)\n  c = Cast <to = 1> (h)\n  b = Tanh (h)\n  y = Add (c, b)"
    )
    assert (first.stream_in.name, first.branch.name, first.stream_out.name) == ("x", "a", "h")
    assert [node.op_type for node in first.nodes] == ["Sigmoid"]
    assert first.stream_operand.name == "x"
    assert (second.stream_in.name, second.branch.name, second.stream_operand.name) == ("h", "b", "c")
    assert [node.op_type for node in second.nodes] == ["Cast", "Tanh"]
    assert second.conditional is None


@pytest.mark.parametrize(
    "end",
    [
        "c = Cast <to = 1> (x)\n d = Identity (x)\n y = Add (c, d)",
        "y = Add (x, norm)",
        "y = Mul (x, half)",
        "a = Tanh (x)\n y = Neg (a)",
    ],
)
def test_stream_ends_when_nothing_computed_from_it_is_added(end: str) -> None:
    assert _blocks(end) == ()


def test_nodes_are_left_out_when_they_only_share_constants_or_lengths_with_a_block() -> None:
    (block,) = _blocks("s = Shape (x)\n  q = Cast <to = 1> (s)\n  a = Mul (x, q)\n  y = Add (x, a)")
    assert [node.op_type for node in block.nodes] == ["Mul"]


FUSED = "a = Tanh (x)\n  n, m, v, y = com.microsoft.SkipSimplifiedLayerNormalization (x, a, norm)"
CAPTURED = "y = If (skip) <then_branch = t () => (o) {o = Tanh (x)}, else_branch = e () => (p) {p = Neg (half)}>"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("a = Tanh (x)\n  h = Add (x, a)\n  y = Add (a, x)", ("the residual stream forks at 'x'", "one addition per")),
        (FUSED, ("com.microsoft::SkipSimplifiedLayerNormalization", "in one node", "hint: run SplitSkipNormsPass")),
        (CAPTURED, ("value 'x' of the residual stream is read inside a subgraph", "Tanh node")),
    ],
    ids=["fork", "fused", "captured"],
)
def test_stream_is_refused_with_the_place_when_it_cannot_be_cut(body: str, words: tuple[str, ...]) -> None:
    with pytest.raises(DecoderLayersNotFound) as caught:
        _blocks(body)
    assert [word for word in words if word not in str(caught.value)] == []


def test_block_in_a_branch_is_found_only_when_the_other_branch_passes_the_stream_on() -> None:
    graph = golden_graph("lower_skip_to_if").graph
    (root,) = embedding_values(graph)
    attention, mlp = residual_blocks(node_order(graph), root)
    assert attention.conditional is None
    assert mlp.conditional is not None
    assert mlp.stream_out is mlp.conditional.outputs[0]
    assert mlp.add.graph is not graph
    _double_what_is_skipped(mlp)
    with pytest.raises(DecoderLayersNotFound, match="passes it on in the other"):
        residual_blocks(node_order(graph), root)


@pytest.mark.parametrize("lowering", ["if", "compaction"])
def test_both_blocks_are_found_in_one_branch_only_when_the_other_passes_the_stream_on(lowering: str) -> None:
    graph = golden_graph(f"lower_whole_layers_to_{lowering}").graph
    (root,) = embedding_values(graph)
    attention, mlp = residual_blocks(node_order(graph), root)
    assert attention.conditional is mlp.conditional is not None
    assert attention.stream_out is mlp.stream_in is attention.add.outputs[0]
    assert mlp.stream_out is mlp.conditional.outputs[0]
    assert attention.add.graph is mlp.add.graph is not graph
    _double_what_is_skipped(mlp)
    with pytest.raises(DecoderLayersNotFound, match="passes it on in the other"):
        residual_blocks(node_order(graph), root)


def _double_what_is_skipped(block: ResidualBlock) -> None:
    """What leaves the branch of skipped steps is not the stream any more."""
    assert block.conditional is not None
    (skipping,) = (branch for branch in subgraphs_of(block.conditional) if branch is not block.add.graph)
    doubled = ir.node("Add", [skipping.outputs[0]] * 2)
    skipping.append(doubled)
    skipping.outputs[0] = doubled.outputs[0]
