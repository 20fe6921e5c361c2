"""Someone else's graph as it is found: what is legal ONNX exports, and computes what it computed."""

import copy
import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlo_export.runtimes.artefact.description import load_description
from tests.foreign_protos import Foreign, fuse_skip_norms, initializer, refer, reference_of


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return Foreign.saved(tmp_path_factory.mktemp("foreign"))


def _move_to_data_file(tensor, folder, name="small"):
    """An inline tensor's contents to a file of its own."""
    array = numpy_helper.to_array(tensor)
    tensor.ClearField("float_data")
    tensor.ClearField("int64_data")
    (folder / name).write_bytes(b"\0" * 64 + array.tobytes())
    tensor.raw_data = b""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    refer(tensor, location=name, offset="64", length=str(array.nbytes))


def _to_constants(proto, chosen):
    """Constant nodes in place of initializers."""
    for tensor in [tensor for tensor in proto.graph.initializer if chosen(tensor)]:
        node = helper.make_node("Constant", [], [tensor.name], name=f"{tensor.name}.node")
        attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
        attribute.t.CopyFrom(tensor)
        proto.graph.initializer.remove(tensor)
        proto.graph.node.insert(0, node)


def _external_constants(proto, folder):
    _to_constants(proto, lambda tensor: tensor.data_location == TensorProto.EXTERNAL)


def _small_external_constants(proto, folder):
    small = [t for t in proto.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert small
    for number, tensor in enumerate(small):
        _move_to_data_file(tensor, folder, f"small.{number}")
    _to_constants(proto, lambda tensor: reference_of(tensor).get("location", "").startswith("small"))


def _small_external_initializers(proto, folder):
    for number, tensor in enumerate(t for t in proto.graph.initializer if t.data_location != TensorProto.EXTERNAL):
        _move_to_data_file(tensor, folder, f"small.{number}")


def _inline_constants(proto, folder):
    _external_constants(proto, folder)
    for node in proto.graph.node:
        if node.op_type == "Constant":
            onnx.external_data_helper.load_external_data_for_tensor(node.attribute[0].t, str(folder))


def _table_in_branches(proto, folder, condition=True):
    """Frequencies that an If gives out, from an initializer of one branch or a Constant of the other."""
    frequencies = numpy_helper.to_array(initializer(proto, "model.rotary_emb.inv_freq"))
    (folder / "table").write_bytes(np.resize(frequencies, 100).tobytes())
    held = TensorProto(name="held", data_type=TensorProto.FLOAT, dims=[100], data_location=TensorProto.EXTERNAL)
    refer(held, location="table")
    made = helper.make_node("Constant", [], ["made"])
    made.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(held)
    given_out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [100]) for name in ("held", "made")]
    chosen = helper.make_node(
        "If",
        ["condition"],
        ["table"],
        then_branch=helper.make_graph([], "then", [], given_out[:1], [held]),
        else_branch=helper.make_graph([made], "else", [], given_out[1:]),
    )
    first = helper.make_node("Gather", ["table", "first"], ["frequencies"])
    for node in (first, chosen):
        proto.graph.node.insert(0, node)
    proto.graph.initializer.append(helper.make_tensor("condition", TensorProto.BOOL, [], [condition]))
    proto.graph.initializer.append(numpy_helper.from_array(np.arange(4), "first"))
    for node in proto.graph.node:
        node.input[:] = ["frequencies" if name == "model.rotary_emb.inv_freq" else name for name in node.input]


def _table_in_the_other_branch(proto, folder):
    _table_in_branches(proto, folder, condition=False)


def _table_shared_by_a_branch(proto, folder):
    """The same, read by a node of the branch: names in it are those of other values outside."""
    _table_in_branches(proto, folder)
    (chosen,) = [node for node in proto.graph.node if node.op_type == "If"]
    for attribute in chosen.attribute:
        inner = attribute.g
        name = inner.output[0].name
        inner.node.append(helper.make_node("Identity", [name], ["model.norm.weight"]))
        inner.output[0].name = "model.norm.weight"


def _unused_things(proto, folder):
    proto.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["b", "s"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(100, np.float32), "left_over"))
    stream = next(node.output[0] for node in proto.graph.node if node.op_type == "Gather")
    # An addition to the stream that nobody reads is no fork.
    proto.graph.node.append(helper.make_node("Add", [stream, stream], ["forgotten"]))


def _unused_mask_and_more(proto, folder):
    _unused_things(proto, folder)
    proto.graph.node.append(helper.make_node("Neg", ["forgotten"], ["more"]))


def _no_node_names(proto, folder):
    for node in proto.graph.node:
        node.name = ""


def _one_node_name(proto, folder):
    for node in proto.graph.node:
        node.name = "node"


def _initializers_as_inputs(proto, folder):
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def _rename(proto, names):
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _names_of_passes(proto, folder):
    """Values and weights called as what passes make, or as the interface of a layer to come."""
    weights = [tensor.name for tensor in proto.graph.initializer]
    inner = [name for node in proto.graph.node for name in node.output if not name.startswith(("present.", "logits"))]
    taken = [
        *("model.routers.threshold", "model.routers.last_axis", "model.routers.0.weight", "model.layers.2.mlp.up"),
        *("model.routers.zero", "past_key_values.3.value", "model.layers.3.mlp.down_proj.weight", "layers.01.x"),
    ]
    _rename(proto, dict(zip(weights, taken, strict=False)))
    taken = [
        *("model.routers.1.scores", "model.layers.0.mlp.masked", "present.2.key", "past_key_values.2.key", "hidden.0"),
        *(
            "router_scores.0",
            "model.layers.1.mlp.if",
            "model.routers.0.active",
            "model.layers.1.mlp.rows",
            "layers.1.x",
        ),
        *("layers.2.x", "layers.4.x", "layers.5.x", "force_active.1", "model.layers.0.mlp.scattered"),
    ]
    _rename(proto, dict(zip(inner, taken, strict=False)))


def _stray_metadata(proto, folder):
    keys = {
        "dlo.pass": "RouteLayersPass",
        "dlo.layer": "no number",
        "dlo.role": "router_scores",
        "dlo.closes": "7",
        "dlo.passes": "{no json",
        "dlo.origin": "[",
    }
    for holder in (proto, proto.graph, *proto.graph.node):
        for key, value in keys.items():
            holder.metadata_props.add(key=key, value=value)


def _hard_links(proto, folder):
    os.link(folder / "weights", folder.parent / "elsewhere")


def _link_inside(proto, folder):
    (folder / "weights").rename(folder / "blob")
    (folder / "weights").symlink_to("blob")


def _folder_of_data(proto, folder):
    (folder / "data").mkdir()
    (folder / "weights").rename(folder / "data" / "weights")
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            refer(tensor, location="data/weights", length=None, checksum="0" * 40)


def _config_through_hub(proto, folder):
    (folder / "config.json").rename(folder / "blob.json")
    (folder / "config.json").symlink_to("blob.json")


def _shadowed_names(proto, folder):
    """A subgraph whose values have names of the outer graph's, as older exporters write them."""
    (last,) = [node for node in proto.graph.node if "logits" in node.output]
    last.output[0] = "logits.raw"
    inner = proto.graph.node[0].output[0]
    info = helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)
    info.type.tensor_type.ClearField("shape")
    branches = [
        helper.make_graph([helper.make_node("Identity", ["logits.raw"], [inner], name=last.name)], "b", [], [info])
        for _ in range(2)
    ]
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    proto.graph.node.append(
        helper.make_node("If", ["yes"], ["logits"], then_branch=branches[0], else_branch=branches[1])
    )


def _functions(proto, folder):
    """The gate's product as a function with a Constant of one, whose data lie in a file."""
    one = numpy_helper.from_array(np.ones(56, np.float32))
    _move_to_data_file(one, folder, "one")
    constant = helper.make_node("Constant", [], ["one"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(one)
    body = [constant, helper.make_node("Mul", ["a", "b"], ["c"])]
    opset = [helper.make_opsetid("", next(o.version for o in proto.opset_import if not o.domain))]
    proto.functions.append(helper.make_function("custom", "Product", ["a", "b"], ["c"], body, opset))
    proto.opset_import.append(helper.make_opsetid("custom", 1))
    for node in proto.graph.node:
        if node.op_type == "Mul" and "mlp" in node.name:
            node.op_type, node.domain = "Product", "custom"


def _fused_skip_norms_without_names(proto, folder):
    fuse_skip_norms(proto, folder)
    _no_node_names(proto, folder)


def _fused_norm(opset):
    """ONNX Runtime's operator, for runtimes that lack it."""
    norm = helper.make_node("RMSNormalization", ["sum", "weight"], ["norm"], axis=-1)
    norm.attribute.add(name="epsilon", type=onnx.AttributeProto.FLOAT, ref_attr_name="epsilon")
    nodes = [helper.make_node("Add", ["x", "skip"], ["sum"]), norm]
    nodes += [helper.make_node("Constant", [], [name], value_float=0.0) for name in ("mean", "variance")]
    inputs, outputs = ["x", "skip", "weight"], ["norm", "mean", "variance", "sum"]
    opsets, name = [helper.make_opsetid("", opset)], "SkipSimplifiedLayerNormalization"
    return helper.make_function("com.microsoft", name, inputs, outputs, nodes, opsets, ["epsilon"])


def _as_mobius_writes(proto, folder):
    """Fused norms, what stands in for them elsewhere, and rotary tables looked up by positions as tokens are."""
    fuse_skip_norms(proto, folder)
    proto.functions.append(_fused_norm(next(o.version for o in proto.opset_import if not o.domain)))
    frequencies = numpy_helper.to_array(initializer(proto, "model.rotary_emb.inv_freq"))
    angles = np.arange(64, dtype=np.float32)[:, None] * frequencies
    for op_type, table in (("Cos", np.cos(angles)), ("Sin", np.sin(angles))):
        (node,) = [node for node in proto.graph.node if node.op_type == op_type]
        proto.graph.initializer.append(numpy_helper.from_array(table, f"{op_type}.table"))
        lookup = helper.make_node("Gather", [f"{op_type}.table", "position_ids"], node.output, name=node.name)
        proto.graph.node.insert(0, lookup)
        proto.graph.node.remove(node)


def _wrong_annotations(proto, folder):
    """What is said of values inside is not so: of another type, of giant or missing shapes."""
    for node in proto.graph.node:
        for name in node.output:
            if name and not name.startswith(("present.", "logits")):
                proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2**40, 3]))


def _typed_fields(proto, folder):
    """Elements in float_data and int64_data instead of raw bytes."""
    for tensor in proto.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.reshape(-1).tolist()))


def _other_name_of_onnx(proto, folder):
    """ONNX's own domain by its longer name, in nodes, functions and imports."""
    _functions(proto, folder)
    for holder in (proto, *proto.functions):
        for entry in holder.opset_import:
            entry.domain = entry.domain or "ai.onnx"
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        node.domain = node.domain or "ai.onnx"


def _both_names_of_onnx(proto, folder):
    proto.opset_import.append(
        helper.make_opsetid("ai.onnx", next(o.version for o in proto.opset_import if not o.domain))
    )
    proto.graph.node[0].domain = "ai.onnx"


def _weight_as_output(proto, folder):
    _external_constants(proto, folder)
    proto.graph.output.append(helper.make_tensor_value_info("model.norm.weight", TensorProto.FLOAT, [32]))


LEGAL = [
    *(_external_constants, _small_external_constants, _small_external_initializers, _inline_constants),
    *(_table_in_branches, _table_in_the_other_branch, _table_shared_by_a_branch),
    *(_unused_things, _unused_mask_and_more, _no_node_names, _one_node_name),
    *(_initializers_as_inputs, _names_of_passes, _stray_metadata, _hard_links, _link_inside, _folder_of_data),
    *(_config_through_hub, _shadowed_names, _functions, fuse_skip_norms, _fused_skip_norms_without_names),
    *(
        _other_name_of_onnx,
        _both_names_of_onnx,
        _as_mobius_writes,
        _wrong_annotations,
        _typed_fields,
        _weight_as_output,
    ),
]


@pytest.mark.parametrize("change", LEGAL, ids=lambda change: change.__name__.strip("_"))
def test_foreign_graph_computes_what_it_did_when_it_is_legal(foreign, tmp_path, change):
    graph = foreign.changed(tmp_path / "model", change)
    artefact = foreign.export(graph, tmp_path / "out")
    # Only its own files may be read: with the source gone, no byte of it can be.
    (tmp_path / "model").rename(tmp_path / "away")
    foreign.check_logits(artefact)
    proto = onnx.load(artefact / "model.onnx", load_external_data=False)
    places = {reference_of(tensor)["location"] for tensor in _external(proto)}
    listed = {file.name.relative_to(artefact).as_posix() for file in load_description(artefact).files}
    assert places == listed - {"model.onnx"}


def _external(proto):
    """External tensors anywhere in a model."""
    waiting = [copy.deepcopy(proto.graph)]
    while waiting:
        graph = waiting.pop()
        tensors = [*graph.initializer]
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
                tensors += [attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors
        yield from (tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL)


@pytest.mark.parametrize("lowering", ["masked", "compact", "if"])
def test_lowered_graph_is_equal_to_pytorch_when_names_and_constants_are_foreign(foreign, tmp_path, lowering):
    def change(proto, folder):
        _as_mobius_writes(proto, folder)
        _no_node_names(proto, folder)
        _small_external_constants(proto, folder)
        _names_of_passes(proto, folder)

    graph = foreign.changed(tmp_path / "model", change)
    artefact = foreign.export(graph, tmp_path / "out", lowering=lowering, parity=True)
    assert load_description(artefact).parity.verdict == "PASS"
    foreign.check_logits(artefact)


def test_weights_are_those_of_each_layer_when_two_layers_share_them(foreign, tmp_path):
    """The second layer reads the first one's weights: what is compared is PyTorch with each weight given twice."""

    def change(proto, folder):
        names = {name: name.replace("layers.1.", "layers.0.") for name in _weights(proto) if "layers.1." in name}
        for node in proto.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        for name in names:
            proto.graph.initializer.remove(initializer(proto, name))

    graph = foreign.changed(tmp_path / "model", change)
    artefact = foreign.export(graph, tmp_path / "out", parity=True)
    assert load_description(artefact).parity.verdict == "PASS"


def _weights(proto):
    return [tensor.name for tensor in proto.graph.initializer]
