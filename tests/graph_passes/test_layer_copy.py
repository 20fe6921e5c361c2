from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.depth.layer_copy import LayerCopy, copy_layer
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from dlo_export.graph_passes.naming import make_node_names_unique
from dlo_export.graph_passes.weights.dense import DenseStorage
from dlo_export.graph_passes.weights.storage import Place, Replacements
from tests.graph_passes.golden_graphs import source_text
from tests.graph_passes.graphs import tiny_decoder, tiny_feeds
from tests.graph_passes.harness import run_model

UP = "model.layers.0.mlp.up_proj"
# The same with the weight the other way round, behind an Identity and a Cast.
PREPARED = f'''same = Identity ("{UP}.weight")
  cast = Cast <to = 1> (same)
  turned = Transpose <perm = [1, 0]> (cast)
  "{UP}" = MatMul ("model.layers.0.post_attention_layernorm", turned)'''
PLAIN = f'"{UP}" = MatMul ("model.layers.0.post_attention_layernorm", "{UP}.weight")'
TURNED = source_text().replace(PLAIN, PREPARED).replace(f'float[4,3] "{UP}.weight"', f'float[3,4] "{UP}.weight"')


def _copy(layer: DecoderLayer, weights: Replacements | None = None) -> LayerCopy:
    same = {value: value for value in (layer.input, layer.past_key, layer.past_value)}
    return copy_layer(layer, same, weights or {}, lambda name: f"{name}.copy", {"made": "here"})


def _new_weights(layer: DecoderLayer) -> dict[Place, dict[ir.Value, ir.Value]]:
    found: dict[Place, dict[ir.Value, ir.Value]] = {}
    for projection in layer.projections.values():
        assert isinstance(projection.storage, DenseStorage)
        new = ir.Value(name=f"new.{projection.tensor}", const_value=projection.weight.const_value)
        found[projection.storage.place] = {projection.weight: new}
    return found


def test_copy_computes_the_same_when_it_reads_what_the_layer_reads() -> None:
    model = ir.from_onnx_text(tiny_decoder())
    expected = run_model(model, tiny_feeds())
    (layer,) = find_decoder_layers(model.graph)
    members, copy = set(layer.nodes), _copy(layer)
    model.graph.insert_after(layer.nodes[-1], copy.nodes)
    outputs = (layer.output, layer.present_key, layer.present_value)
    for old, new in zip(outputs, (copy.output, *copy.cache[2:]), strict=True):
        for use in [use for use in old.uses() if use.node not in members]:
            use.node.replace_input_with(use.idx, new)
        model.graph.outputs[:] = [new if output is old else output for output in model.graph.outputs]
    make_node_names_unique(model.graph)
    found = run_model(model, tiny_feeds())
    for array, name in zip(found.values(), expected, strict=True):
        np.testing.assert_array_equal(array, expected[name])


def test_copy_reads_its_own_cache_alone_when_a_node_stands_between_cache_and_layer() -> None:
    text = tiny_decoder().replace('Concat <axis = 1> ("past_key_values.0.key", x)', "Concat <axis = 1> (scaled, x)")
    text = text.replace("x = Gather", 'length = Shape ("past_key_values.0.key")\n  two = Cast <to = 1> (last)\n'
                        '  scaled = Mul ("past_key_values.0.key", two)\n  x = Gather')  # fmt: skip
    (layer,) = find_decoder_layers(ir.from_onnx_text(text).graph)
    past = [ir.Value(name=f"new.{part}") for part in ("key", "value")]
    reads = dict(zip((layer.past_key, layer.past_value), past, strict=True))
    copy = copy_layer(layer, reads, {}, lambda name: f"{name}.copy", {})
    (scaled,) = [node for node in copy.nodes if node.op_type == "Mul" and node.inputs[0] is past[0]]
    (joined,) = [node for node in copy.nodes if node.op_type == "Concat" and node.inputs[0] is scaled.outputs[0]]
    assert joined.outputs[0] is copy.cache[2]
    # Lengths are the same for all layers, and computed once.
    assert not [node for node in copy.nodes if node.op_type == "Shape"]
    assert not {layer.past_key, layer.past_value} & {value for node in copy.nodes for value in node.inputs}


def test_copy_has_names_tags_and_shapes_of_its_own_when_made() -> None:
    graph = ir.from_onnx_text(source_text()).graph
    (layer,) = find_decoder_layers(graph)
    before = str(graph)
    copy = _copy(layer)
    assert str(graph) == before
    assert [node.op_type for node in copy.nodes] == [node.op_type for node in layer.nodes]
    for old, new in zip(layer.nodes, copy.nodes, strict=True):
        assert new.graph is None
        assert new.metadata_props["made"] == "here"
        assert "made" not in old.metadata_props
        assert dict(new.attributes) == dict(old.attributes)
        for old_output, output in zip(old.outputs, new.outputs, strict=True):
            assert output.name == f"{old_output.name}.copy"
            assert output.shape is None or output.shape is not old_output.shape
            assert (output.shape, output.type) == (old_output.shape, old_output.type)


def test_copy_reads_the_replacements_when_stream_and_cache_are_given() -> None:
    graph = ir.from_onnx_text(source_text()).graph
    (layer,) = find_decoder_layers(graph)
    reads = {
        value: ir.Value(name=f"given.{i}") for i, value in enumerate((layer.input, layer.past_key, layer.past_value))
    }
    copy = copy_layer(layer, reads, {}, lambda name: f"{name}.copy", {})
    read = {value for node in copy.nodes for value in node.inputs}
    assert set(reads.values()) <= read
    assert not set(reads) & read
    assert copy.cache[:2] == (reads[layer.past_key], reads[layer.past_value])
    assert [value.name for value in copy.cache[2:]] == ["present.0.key.copy", "present.0.value.copy"]
    assert copy.output.producer() is copy.nodes[-1]


def test_new_weight_is_prepared_like_the_old_when_it_is_cast_and_transposed() -> None:
    (layer,) = find_decoder_layers(ir.from_onnx_text(TURNED).graph)
    weights = _new_weights(layer)
    copy = _copy(layer, weights)
    projection = layer.projections["up_proj"]
    assert isinstance(projection.storage, DenseStorage)
    up = weights[projection.storage.place][projection.weight]
    (cast,) = up.consumers()
    (transpose,) = cast.outputs[0].consumers()
    (product,) = transpose.outputs[0].consumers()
    assert [node.op_type for node in (cast, transpose, product)] == ["Cast", "Transpose", "MatMul"]
    assert [copy.nodes.index(node) for node in (cast, transpose, product)] == sorted(
        map(copy.nodes.index, (cast, transpose, product))
    )
    assert copy.initializers == tuple(new for constants in weights.values() for new in constants.values())
    assert not {p.weight for p in layer.projections.values()} & {v for node in copy.nodes for v in node.inputs}
