"""Each check of a graph, and of its layers, names what breaks it."""

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.spec import graph_checks, layer_checks
from dlo_export.graph_passes.spec.invariants import PLAIN, check_stage
from tests.graph_passes.graphs import masked_decoder, tiny_decoder


def decoder(text):
    return ir.from_onnx_text(text).graph


def test_masked_decoder_breaks_no_check():
    graph = decoder(masked_decoder())
    for check in (
        graph_checks.unused_inputs,
        graph_checks.broken_values,
        graph_checks.foreign_branch_outputs,
    ):
        assert list(check(graph)) == [], check.__name__
    for layer_check in (layer_checks.incomplete_cache, layer_checks.unmasked_routing, layer_checks.eager_branches):
        assert list(layer_check(graph, find_decoder_layers(graph))) == [], layer_check.__name__


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
    model = ir.from_onnx_text(tiny_decoder())
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = (value.name or "").replace(f".0.{part}", f".1.{part}")
    with pytest.raises(GraphPassError, match=f"expected 'past_key_values.0.{part}'"):
        check_stage(model, PLAIN)


def test_state_of_activity_is_named_when_only_one_side_has_it():
    graph = decoder(tiny_decoder(inputs=', bool[B,P] "past_active.0"'))
    (problem,) = layer_checks.incomplete_cache(graph, find_decoder_layers(graph))
    assert problem == "layers [0] read who was active, layers [] give it out; expected the same"


def test_masked_layer_is_unlowered_until_its_lowering_ran():
    graph, name = (model := ir.from_onnx_text(masked_decoder())).graph, LowerSkipToIfPass.__name__
    unlowered = layer_checks.unlowered_routing(graph, find_decoder_layers(graph), pass_name=name)
    assert list(unlowered) == ["layer 0 is still masked"]
    LowerSkipToIfPass()(model)
    layers = find_decoder_layers(graph)
    assert list(layer_checks.unlowered_routing(graph, layers, pass_name=name)) == []
    assert list(layer_checks.eager_branches(graph, layers)) == []
