"""Every check fires on a network that TensorRT-RTX really parsed, and none on a sound one."""

import onnx_ir as ir
import pytest
import tensorrt_rtx as trt
from onnx import TensorProto as T
from onnx import helper

from dlo_export.exporter.tensorrt.census import missing_mechanisms, take_census
from dlo_export.exporter.tensorrt.engine_request import intended_dtypes
from dlo_export.exporter.tensorrt.export import engine_request
from dlo_export.exporter.tensorrt.network_checks import (
    check_network,
    eager_work,
    make_attentions_decomposable,
    unmasked_attentions,
    unused_inputs,
    wrong_dtypes,
)
from dlo_export.plugins import registration
from tests.exporter.tiny_engines import node, plan

LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)


@pytest.fixture
def parse():
    """Parses a model into a network, which lives as long as the test."""
    alive = []

    def parsed(model):
        builder = trt.Builder(LOGGER)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, LOGGER)
        alive.append((builder, network, parser))
        assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return network

    registration.register_twins()
    return parsed


def graph_of(model):
    """A graph of the exporter's, its weights inside."""
    return ir.to_proto(model)


def request_for(planned, tmp_path):
    return engine_request(planned, planned.engines[0], tmp_path)


def small_model(nodes, inputs, outputs, initializers=()):
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *values, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("lowering", ["none", "compact", "if", "plugin"])
def test_check_network_finds_nothing_when_network_is_sound(parse, tmp_path, lowering, dtype):
    planned = plan(lowering, 2, dtype)
    network = parse(graph_of(planned.engines[0].model))
    census, problems = check_network(trt, network, request_for(planned, tmp_path))
    assert problems == []
    assert sum(census.total.values()) == network.num_layers
    expected = {
        "none": {},
        "compact": {"TOPK": 1, "GATHER": 2, "SCATTER": 1},  # rows, and their scales
        "if": {"CONDITION": 1, "CONDITIONAL_OUTPUT": 1},
        "plugin": {"PLUGIN_V3": 2},
    }
    found = {layer: dict(types) for layer, types in census.skipping.items()}
    for types in found.values():  # one per value that a branch reads from outside
        assert (types.pop("CONDITIONAL_INPUT", 0) > 0) == (lowering == "if")
    assert found == ({} if lowering == "none" else dict.fromkeys(range(2), expected[lowering]))


ATTENTION_INPUTS = [
    ("q", T.FLOAT16, ["b", 2, "s", 16]),
    ("k", T.FLOAT16, ["b", 2, 32, 16]),
    ("v", T.FLOAT16, ["b", 2, 32, 16]),
    ("kv_lengths", T.INT64, ["b"]),
]
ATTENTION_OUTPUTS = [("y", T.FLOAT16, ["b", 2, "s", 16])]


def test_checks_fire_when_importer_drops_nonpad_kv_seqlen(parse):
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "kv_lengths"], ["y"], name="attention")
    network = parse(small_model([node], ATTENTION_INPUTS, ATTENTION_OUTPUTS))
    assert ["kv_lengths" in problem for problem in unused_inputs(trt, network)] == [True]
    assert ["has no mask" in problem for problem in unmasked_attentions(trt, network)] == [True]


def test_unmasked_attentions_fires_when_attention_is_causal(parse):
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention", is_causal=1)
    network = parse(small_model([node], ATTENTION_INPUTS[:3], ATTENTION_OUTPUTS))
    assert any("is causal" in problem for problem in unmasked_attentions(trt, network))


def test_unmasked_attentions_names_every_attention_when_none_has_a_mask(parse):
    model = plan("none", 2).engines[0].model
    for layer in range(2):
        node(model, f"model.layers.{layer}.self_attn.attention_heads").replace_input_with(3, None)
    network = parse(graph_of(model))
    problems = list(unmasked_attentions(trt, network))
    assert [f"model.layers.{layer}.self_attn.attention_heads" in problems[layer] for layer in range(2)] == [True, True]
    assert len(problems) == 2


def test_unused_inputs_fires_when_what_reads_an_input_leads_nowhere(parse):
    nodes = [
        helper.make_node("Neg", ["x"], ["y"], name="used"),
        helper.make_node("Neg", ["z"], ["nowhere"], name="dead"),
    ]
    inputs = [("x", T.FLOAT, ["a", 4]), ("z", T.FLOAT, ["a", 4])]
    network = parse(small_model(nodes, inputs, [("y", T.FLOAT, ["a", 4])]))
    (problem,) = unused_inputs(trt, network)
    assert "'z'" in problem


def test_unused_inputs_is_silent_when_an_input_only_decides_a_branch(parse):
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["x"], [f"{op}_out"], name=op)],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", T.FLOAT, None)],
        )
        for op in ("Neg", "Identity")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["flag"], ["largest"], name="largest", keepdims=0),
        helper.make_node("Cast", ["largest"], ["condition"], name="condition", to=T.BOOL),
        helper.make_node("If", ["condition"], ["y"], name="if", then_branch=branch[0], else_branch=branch[1]),
    ]
    inputs = [("x", T.FLOAT, ["a", 4]), ("flag", T.FLOAT, ["a"])]
    network = parse(small_model(nodes, inputs, [("y", T.FLOAT, ["a", 4])]))
    assert list(unused_inputs(trt, network)) == []


def test_wrong_dtypes_names_values_when_they_are_of_another_type_or_gone(parse):
    model = plan("compact", 2, "fp16").engines[0].model
    network = parse(graph_of(model))
    wanted = intended_dtypes(model) | {"logits": "bfloat16", "model.routers.1.logits": "float16", "elsewhere": "float"}
    del wanted["kv_lengths"]
    assert set(wrong_dtypes(trt, network, wanted)) == {
        "'logits' is float16, expected bfloat16",
        "'model.routers.1.logits' is float, expected float16",
        "'elsewhere' is not in the network, expected it in float",
        "'kv_lengths' is an input or output nobody asked for",
    }


@pytest.mark.parametrize("lowering", ["compact", "if", "plugin"])
def test_missing_mechanisms_names_the_layers_when_they_are_dense(parse, lowering):
    census = take_census(trt, parse(graph_of(plan("none", 2).engines[0].model)), lowering, (0, 1))
    problems = list(missing_mechanisms(census, lowering))
    assert [f"decoder layer {layer} " in problems[layer] for layer in range(2)] == [True, True]


def test_missing_mechanisms_names_what_lacks_when_lowering_is_another(parse):
    census = take_census(trt, parse(graph_of(plan("compact").engines[0].model)), "if", (0,))
    (problem,) = missing_mechanisms(census, "if")
    assert "CONDITION, CONDITIONAL_INPUT, CONDITIONAL_OUTPUT" in problem


@pytest.mark.parametrize("lowering", ["compact", "if", "plugin"])
def test_eager_work_names_the_nodes_when_mlp_runs_beside_the_mechanism(parse, tmp_path, lowering):
    """A second MLP on all tokens, as when a pass forgets to move a node."""
    planned = plan(lowering, 2)
    model = planned.engines[0].model
    sound = graph_of(model)
    weight = ir.to_proto(model.graph.initializers["model.layers.1.mlp.gate_proj.weight"].const_value)
    weight.name = "model.layers.1.mlp.forgotten.weight"  # the plugin lowering holds its own transposed
    sound.graph.initializer.append(weight)
    extra = [
        helper.make_node(
            "MatMul",
            ["model.layers.1.attention_residual", weight.name],
            ["model.layers.1.mlp.forgotten"],
            name="model.layers.1.mlp.forgotten",
        ),
        helper.make_node("ReduceMax", ["model.layers.1.mlp.forgotten"], ["most"], name="most", keepdims=1),
        helper.make_node("Add", ["logits_alone", "most"], ["logits"], name="sum"),
    ]
    sound.graph.node[-1].output[0] = "logits_alone"
    sound.graph.node.extend(extra)
    (problem,) = eager_work(trt, parse(sound), request_for(planned, tmp_path))
    assert "'model.layers.1.mlp.forgotten' of routed decoder layer 1" in problem


@pytest.mark.parametrize(("lowering", "dtype"), [("if", "bf16"), ("compact", "fp32"), ("compact", "bf16")])
def test_make_attentions_decomposable_marks_all_of_them(parse, lowering, dtype):
    network = parse(graph_of(plan(lowering, 3, dtype).engines[0].model))
    assert make_attentions_decomposable(trt, network) == 3
    marked = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer
            marked += layer.attention.decomposable
    assert marked == 3
