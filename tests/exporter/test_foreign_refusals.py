"""Someone else's graph that cannot be used: refused with its place, nothing written."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.inspection import inspect_model
from tests.foreign_protos import Foreign, initializer, refer, reference_of

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return Foreign.saved(tmp_path_factory.mktemp("foreign"))


def _reference(**changes):
    return lambda proto, folder: refer(initializer(proto, WEIGHT), **changes)


def _beyond_the_file(proto, folder):
    refer(initializer(proto, WEIGHT), offset=str((folder / "weights").stat().st_size - 100))


def _absolute_but_inside(proto, folder):
    refer(initializer(proto, WEIGHT), location=str(folder / "weights"))


def _link_out(proto, folder):
    (folder / "weights").rename(folder.parent / "weights")
    (folder / "weights").symlink_to(folder.parent / "weights")


def _link_loop(proto, folder):
    (folder / "weights").unlink()
    (folder / "weights").symlink_to("weights")


def _no_regular_file(proto, folder):
    (folder / "weights").unlink()
    os.mkfifo(folder / "weights")


def _constant_out_of_the_folder(proto, folder):
    tensor = initializer(proto, WEIGHT)
    refer(tensor, location="../weights")
    node = helper.make_node("Constant", [], [WEIGHT], name="constant")
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    proto.graph.initializer.remove(tensor)
    proto.graph.node.insert(0, node)


def _branch_out_of_the_folder(proto, folder):
    held = TensorProto(name="held", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    refer(held, location="/etc/passwd")
    output = helper.make_tensor_value_info("held", TensorProto.FLOAT, [2])
    branches = [helper.make_graph([], name, [], [output], [held]) for name in ("then", "else")]
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    node = helper.make_node("If", ["yes"], ["unread"], then_branch=branches[0], else_branch=branches[1])
    proto.graph.node.append(node)


def _function_out_of_the_folder(proto, folder):
    held = TensorProto(name="held", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    refer(held, location="../weights")
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(held)
    proto.functions.append(helper.make_function("custom", "F", [], ["c"], [node], [helper.make_opsetid("", 23)]))


def _dims(*dims):
    def change(proto, folder):
        tensor = initializer(proto, WEIGHT)
        del tensor.dims[:]
        tensor.dims.extend(dims)
        refer(tensor, length=None)

    return change


def _element_type(number):
    def change(proto, folder):
        initializer(proto, WEIGHT).data_type = number

    return change


def _short_raw_data(proto, folder):
    tensor = initializer(proto, "model.norm.weight")
    tensor.raw_data = numpy_helper.to_array(tensor).tobytes()[:-1]


def _short_float_data(proto, folder):
    tensor = initializer(proto, "model.norm.weight")
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 31)


def _twice(field):
    def change(proto, folder):
        entries = getattr(proto.graph, field)
        entries.add().CopyFrom(entries[0])

    return change


def _one_output_of_two_nodes(proto, folder):
    proto.graph.node.add().CopyFrom(proto.graph.node[3])


def _cyclic(proto, folder):
    nodes = proto.graph.node
    first = next(node for node in nodes if node.op_type == "RMSNormalization")
    first.input[0] = next(node.input[0] for node in reversed(nodes) if node.op_type == "RMSNormalization")


def _reversed(proto, folder):
    nodes = [copied for node in reversed(proto.graph.node) if (copied := onnx.NodeProto()).CopyFrom(node) is None]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _calls_itself(proto, folder):
    node = helper.make_node("F", ["a"], ["b"], domain="custom")
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("custom", 1)]
    proto.functions.append(helper.make_function("custom", "F", ["a"], ["b"], [node], opsets))
    proto.opset_import.append(helper.make_opsetid("custom", 1))
    proto.graph.node.append(helper.make_node("F", ["input_ids"], ["unread"], domain="custom"))


def _opset(version):
    def change(proto, folder):
        proto.opset_import[0].version = version

    return change


def _ir_version(proto, folder):
    proto.ir_version = 10_000


def _unknown_operator(proto, folder):
    next(node for node in proto.graph.node if node.op_type == "Mul").op_type = "Multiply"


def _missing_input(proto, folder):
    del next(node for node in proto.graph.node if node.op_type == "Gather").input[1:]


def _missing_attribute(proto, folder):
    del next(node for node in proto.graph.node if node.op_type == "Cast").attribute[:]


def _attribute(**changes):
    def change(proto, folder):
        attribute = next(node for node in proto.graph.node if node.op_type == "Cast").attribute[0]
        for name, value in changes.items():
            setattr(attribute, name, value)

    return change


def _attribute_twice(proto, folder):
    attributes = next(node for node in proto.graph.node if node.op_type == "Cast").attribute
    attributes.add().CopyFrom(attributes[0])


def _constant_of_another_type(proto, folder):
    node = helper.make_node("Constant", [], ["unread"], name="constant")
    node.attribute.add(name="value", type=onnx.AttributeProto.GRAPH)
    proto.graph.node.insert(0, node)


def _strings(proto, folder):
    initializer(proto, "model.norm.weight").CopyFrom(helper.make_tensor("model.norm.weight", 8, [1], ["text"]))


def _shared_insides(proto, folder):
    """Another layer reads what the first one's MLP computes inside."""
    inside = next(node.output[0] for node in proto.graph.node if node.op_type == "Sigmoid")
    (last,) = [node for node in proto.graph.node if "logits" in node.output]
    proto.graph.node.append(helper.make_node("ReduceSum", [inside], ["sum"], keepdims=0))
    last.output[0] = "raw"
    proto.graph.node.append(helper.make_node("Add", ["raw", "sum"], ["logits"]))


def _no_output_called_logits(proto, folder):
    """Two outputs are no part of the cache, and neither has the name."""
    (last,) = [node for node in proto.graph.node if "logits" in node.output]
    last.output[0] = proto.graph.output[0].name = "scores"
    proto.graph.output.add().CopyFrom(proto.graph.output[0])
    proto.graph.output[-1].name = "again"
    proto.graph.node.append(helper.make_node("Neg", ["scores"], ["again"]))


def _added_to_the_logits(proto, *nodes):
    (last,) = [node for node in proto.graph.node if "logits" in node.output]
    last.output[0] = "raw"
    proto.graph.node.extend([*nodes, helper.make_node("Add", ["raw", nodes[-1].output[0]], ["logits"])])


def _input_of_its_own(proto, folder):
    proto.graph.input.append(helper.make_tensor_value_info("temperature", TensorProto.FLOAT, []))
    _added_to_the_logits(proto, helper.make_node("Neg", ["temperature"], ["colder"]))


def _no_kernel(proto, folder):
    """ONNX compares 16-bit integers, ONNX Runtime's CPU provider does not."""
    cast = helper.make_node("Cast", ["input_ids"], ["short"], to=TensorProto.INT16)
    wide = helper.make_node("Cast", ["larger"], ["wide"], to=TensorProto.FLOAT)
    total = helper.make_node("ReduceSum", ["wide"], ["total"], keepdims=0)
    _added_to_the_logits(proto, cast, helper.make_node("Max", ["short", "short"], ["larger"]), wide, total)


def _counted(proto, *made):
    """Numbers of a node's that must have come about, whatever they say."""
    wide = helper.make_node("Cast", ["made"], ["wide"], to=TensorProto.FLOAT)
    _added_to_the_logits(proto, *made, wide, helper.make_node("ReduceSum", ["wide"], ["total"], keepdims=0))


def _one_token_alone(proto, folder):
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    _counted(proto, helper.make_node("Squeeze", ["input_ids", "axis"], ["made"]))


def _nothing_before(proto, folder):
    shape = helper.make_node("Shape", ["input_ids"], ["ids"])
    _counted(proto, shape, helper.make_node("Reshape", ["attention_mask", "ids"], ["made"]))


def _unknown_value(proto, folder):
    next(node for node in proto.graph.node if node.op_type == "Mul").input[0] = "nowhere"


def _other_element_type(proto, folder):
    """A weight of float16 where the stream is float32."""
    tensor = initializer(proto, WEIGHT)
    array = np.ones(list(tensor.dims), np.float16)
    tensor.CopyFrom(numpy_helper.from_array(array, WEIGHT))


def _other_shape(proto, folder):
    tensor = initializer(proto, WEIGHT)
    tensor.CopyFrom(numpy_helper.from_array(np.ones((32, 57), np.float32), WEIGHT))


def _output_of_another_type(proto, folder):
    output = next(value for value in proto.graph.output if value.name == "logits")
    output.type.tensor_type.elem_type = TensorProto.FLOAT16


def _tokens_without_shape(proto, folder):
    proto.graph.input[0].type.tensor_type.ClearField("shape")


def _negative_dimension(proto, folder):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def _no_type(proto, folder):
    proto.graph.input[0].ClearField("type")


def _without_cache(proto, folder):
    for field in (proto.graph.input, proto.graph.output):
        for value in [value for value in field if value.name.startswith(("past", "present"))]:
            field.remove(value)


def _config(**changes):
    def change(proto, folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _config_link_out(proto, folder):
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def _config_link_nowhere(proto, folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("nowhere")


def _generation_config_link_out(proto, folder):
    (folder / "generation_config.json").symlink_to("/etc/passwd")


ILLEGAL = {
    "offset_negative": (_reference(offset="-4"), WEIGHT),
    "offset_beyond": (_beyond_the_file, WEIGHT),
    "offset_huge": (_reference(offset=str(2**70)), WEIGHT),
    "offset_word": (_reference(offset="four"), WEIGHT),
    "length_short": (_reference(length="4"), WEIGHT),
    "length_negative": (_reference(length="-1"), WEIGHT),
    "location_missing": (_reference(location=None), WEIGHT),
    "location_of_no_file": (_reference(location="nothing"), "nothing"),
    "location_a_folder": (_reference(location="."), "no such file"),
    "location_absolute": (_reference(location="/etc/passwd"), WEIGHT),
    "location_absolute_inside": (_absolute_but_inside, WEIGHT),
    "location_parent": (_reference(location="../weights"), "outside"),
    "location_nul": (_reference(location="weights\0"), WEIGHT),
    "location_long": (_reference(location="w" * 5000), WEIGHT),
    "link_out": (_link_out, "outside"),
    "link_loop": (_link_loop, "weights"),
    "fifo": (_no_regular_file, "weights"),
    "constant_out": (_constant_out_of_the_folder, "Constant node 'constant'"),
    "branch_out": (_branch_out_of_the_folder, "held"),
    "function_out": (_function_out_of_the_folder, "held"),
    "dims_negative": (_dims(-32, -56), WEIGHT),
    "dims_giant": (_dims(2**40, 2**40), WEIGHT),
    "dims_beyond": (_dims(32, 5600), WEIGHT),
    "type_undefined": (_element_type(0), WEIGHT),
    "type_unknown": (_element_type(99), WEIGHT),
    "raw_data_short": (_short_raw_data, "model.norm.weight"),
    "float_data_short": (_short_float_data, "model.norm.weight"),
    "initializer_twice": (_twice("initializer"), "model.embed_tokens.weight"),
    "input_twice": (_twice("input"), "input_ids"),
    "output_twice": (_twice("output"), "logits"),
    "value_twice": (_one_output_of_two_nodes, "model.rotary_emb.angles"),
    "cyclic": (_cyclic, "before it is computed"),
    "reversed": (_reversed, "before it is computed"),
    "function_of_itself": (_calls_itself, "functions"),
    "opset_of_the_future": (_opset(999), "opset is 999"),
    "opset_zero": (_opset(0), "opset is 0"),
    "opset_of_the_past": (_opset(7), "Unsqueeze"),
    "ir_version_of_the_future": (_ir_version, "IR version is 10000"),
    "operator_unknown": (_unknown_operator, "Multiply"),
    "input_missing": (_missing_input, "Gather"),
    "attribute_missing": (_missing_attribute, "Cast"),
    "attribute_without_type": (_attribute(type=0), "Cast"),
    "attribute_without_name": (_attribute(name=""), "Cast"),
    "attribute_twice": (_attribute_twice, "Cast"),
    "attribute_of_another_type": (_attribute(type=onnx.AttributeProto.FLOAT), "'to' is FLOAT, expected INT"),
    "constant_of_another_type": (_constant_of_another_type, "'value' is GRAPH, expected TENSOR"),
    "strings": (_strings, "model.norm.weight"),
    "insides_shared": (_shared_insides, "mlp.gate_sigmoid"),
    "no_logits": (_no_output_called_logits, r"outputs \['logits'\] are missing"),
    "input_of_its_own": (_input_of_its_own, r"inputs \['temperature'\] are unknown"),
    "no_kernel": (_no_kernel, r"cannot be loaded: ONNX Runtime .*Max\(13\)"),
    "one_token_alone": (_one_token_alone, r"cannot be run: ONNX Runtime .*2 tokens behind 0: .*Squeeze"),
    "nothing_before": (_nothing_before, r"cannot be run: ONNX Runtime .*1 tokens behind 2: .*Reshape"),
    "value_unknown": (_unknown_value, "nowhere"),
    "weight_of_another_type": (_other_element_type, "up_proj"),
    "weight_of_another_shape": (_other_shape, "mlp.gated"),
    "output_of_another_type": (_output_of_another_type, "logits"),
    "tokens_without_shape": (_tokens_without_shape, "input_ids"),
    "dimension_negative": (_negative_dimension, "input_ids"),
    "no_type": (_no_type, "input_ids"),
    "without_cache": (_without_cache, "past_key_values"),
    "config_hidden": (_config(hidden_size=64), "hidden|model.norm.weight"),
    "config_layers": (_config(num_hidden_layers=3), "layers 3 in config.json, 2 in the graph"),
    "config_vocabulary": (_config(vocab_size=98), "embed_tokens"),
    "config_heads": (_config(num_attention_heads=8, num_key_value_heads=4, head_dim=4), "KV heads 4"),
    "config_link_out": (_config_link_out, "outside"),
    "config_link_nowhere": (_config_link_nowhere, "config.json: no such file"),
    "generation_config_link_out": (_generation_config_link_out, "outside"),
}


@pytest.mark.parametrize(("change", "place"), ILLEGAL.values(), ids=ILLEGAL)
def test_foreign_graph_is_refused_by_its_place_when_it_is_illegal(foreign, tmp_path, change, place):
    graph = foreign.changed(tmp_path / "model", change)
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError, match=place) as refusal:
        foreign.export(graph, tmp_path / "work" / "out")
    assert refusal.value.hint
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("kept", [0, 1, 1000, 0.5, 0.9, -1])
def test_foreign_graph_is_refused_when_its_file_is_cut(foreign, tmp_path, kept):
    graph = foreign.changed(tmp_path / "model", lambda proto, folder: None)
    data = graph.read_bytes()
    graph.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError):
        foreign.export(graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_foreign_graph_is_refused_when_a_name_is_no_text(foreign, tmp_path):
    graph = foreign.changed(tmp_path / "model", lambda proto, folder: None)
    graph.write_bytes(graph.read_bytes().replace(b"gate_sigmoid", b"gate_\xff\xfe\xfdmoid"))
    with pytest.raises(InputError, match="not UTF-8"):
        foreign.export(graph, tmp_path / "out")


def _ids_of_32_bits(proto, folder):
    ids = next(value for value in proto.graph.input if value.name == "input_ids")
    ids.type.tensor_type.elem_type = TensorProto.INT32


def test_graph_is_refused_when_its_tokens_are_counted_in_32_bits(foreign, tmp_path):
    graph = foreign.changed(tmp_path / "model", _ids_of_32_bits)
    with pytest.raises(InputError, match="input input_ids is int32, expected int64"):
        foreign.export(graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_graph_is_refused_when_its_layers_are_routed_already(foreign, tmp_path):
    graph = foreign.changed(tmp_path / "model", lambda proto, folder: None)
    artefact = foreign.export(graph, tmp_path / "out")
    with pytest.raises(InputError, match="routers already"):
        foreign.export(artefact / "model.onnx", tmp_path / "again")
    # The graph alone says so too.
    (tmp_path / "alone").mkdir()
    for name in ("model.onnx", "model.onnx.data", "weights"):
        shutil.copy(artefact / name, tmp_path / "alone")
    with pytest.raises(InputError, match="routers already"):
        foreign.export(tmp_path / "alone" / "model.onnx", tmp_path / "again")


def test_problems_are_said_once_and_fit_a_screen_when_every_tensor_has_one(foreign, tmp_path):
    graph = foreign.changed(tmp_path / "model", lambda proto, folder: (folder / "weights").unlink())
    with pytest.raises(InputError) as refusal:
        foreign.export(graph, tmp_path / "out")
    assert refusal.value.message.count("weights: no such file") == 1
    assert reference_of(initializer(onnx.load(graph, load_external_data=False), WEIGHT))["location"] == "weights"


@pytest.mark.parametrize("case", ["fifo", "link_out", "input_missing", "cyclic", "type_undefined", "dims_negative"])
def test_inspection_says_what_is_wrong_or_leaves_it_out_when_a_graph_is_hostile(foreign, tmp_path, case):
    graph = foreign.changed(tmp_path / "model", ILLEGAL[case][0])
    if case in ("fifo", "link_out"):  # of the data files, which need not be there
        assert [layer["identity"] for layer in inspect_model(graph).layers] == [None, None]
    else:
        with pytest.raises(InputError):
            inspect_model(graph)
