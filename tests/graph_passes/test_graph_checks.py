"""Each check names what breaks it."""

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.spec import graph_checks
from tests.graph_passes.graphs import masked_decoder, tiny_decoder


def decoder(text):
    return ir.from_onnx_text(text).graph


def test_masked_decoder_breaks_no_check():
    graph = decoder(masked_decoder())
    for check in (
        graph_checks.unused_inputs,
        graph_checks.broken_values,
        graph_checks.foreign_branch_outputs,
        graph_checks.incomplete_cache,
        graph_checks.eager_branches,
    ):
        assert list(check(graph)) == [], check.__name__


def test_input_is_named_when_nothing_reads_it():
    graph = decoder(tiny_decoder(inputs=", float[1] idle"))
    assert list(graph_checks.unused_inputs(graph)) == ["graph input 'idle' has no consumer"]


def test_initializers_are_named_when_nothing_reads_them():
    found = list(graph_checks.broken_values(decoder(tiny_decoder())))
    assert found == [f"initializer '{name}' has no consumer" for name in ("last", "zero")]


def test_node_is_named_when_it_reads_what_comes_later():
    graph = decoder(tiny_decoder())
    nodes = list(graph)
    graph.remove(nodes[0])
    graph.append(nodes[0])
    found = list(graph_checks.misordered_values(graph))
    assert found
    assert all("reads 'x' before it is computed" in problem for problem in found)


@pytest.mark.parametrize("part", ["key", "value"])
def test_cache_is_incomplete_when_a_name_is_not_its_layers(part):
    graph = decoder(tiny_decoder())
    for value in (*graph.inputs, *graph.outputs):
        value.name = (value.name or "").replace(f".0.{part}", f".1.{part}")
    (problem,) = graph_checks.incomplete_cache(graph)
    assert f"expected 'past_key_values.0.{part}'" in problem


def test_masked_layer_is_unlowered_until_its_lowering_ran():
    model = ir.from_onnx_text(masked_decoder())
    name = LowerSkipToIfPass.__name__
    assert list(graph_checks.unlowered_routing(model.graph, pass_name=name)) == ["layer 0 is still masked"]
    LowerSkipToIfPass()(model)
    assert list(graph_checks.unlowered_routing(model.graph, pass_name=name)) == []
    assert list(graph_checks.eager_branches(model.graph)) == []
