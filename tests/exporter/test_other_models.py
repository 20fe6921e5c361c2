"""Graphs that are no Llama's: refused by what they lack, nothing written."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from tests.foreign_protos import Foreign

NAMES = {
    "past_key": "past_key_values.0.key",
    "past_value": "past_key_values.0.value",
    "present_key": "present.0.key",
    "present_value": "present.0.value",
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return Foreign.saved(tmp_path_factory.mktemp("foreign"))


def _saved(tmp_path, nodes, inputs, outputs, initializers):
    graph = helper.make_graph(nodes, "other", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "other.onnx")
    return tmp_path / "other.onnx"


def _tokens(name="input_ids"):
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])


def _floats(name, *dims):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def _weights(**shapes):
    return [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in shapes.items()]


def _convolutional(tmp_path):
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["active"]),
        helper.make_node("Add", ["active", "image"], ["sum"]),
    ]
    outputs = [_floats("sum", 1, 3, 8, 8)]
    return _saved(tmp_path, nodes, [_floats("image", 1, 3, 8, 8)], outputs, _weights(kernel=(3, 3, 3, 3)))


def _encoder(tmp_path):
    """BERT-like: two embeddings, attention without a cache, norm after the addition."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["w"]),
        helper.make_node("Gather", ["segments", "token_type_ids"], ["t"]),
        helper.make_node("Add", ["w", "t"], ["x"]),
        helper.make_node("MatMul", ["x", "query"], ["q"]),
        helper.make_node("Softmax", ["q"], ["p"]),
        helper.make_node("Add", ["x", "p"], ["h"]),
        helper.make_node("LayerNormalization", ["h", "scale", "offset"], ["y"]),
    ]
    weights = _weights(words=(10, 4), segments=(2, 4), query=(4, 4), scale=(4,), offset=(4,))
    outputs = [_floats("y", "batch", "sequence", 4)]
    return _saved(tmp_path, nodes, [_tokens(), _tokens("token_type_ids")], outputs, weights)


def _learned_positions(tmp_path):
    """GPT-2-like: positions are an embedding, the MLP has one matrix in, the cache belongs to attention."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["w"]),
        helper.make_node("Gather", ["places", "position_ids"], ["p"]),
        helper.make_node("Add", ["w", "p"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "scale", "offset"], ["n"]),
        helper.make_node("MatMul", ["n", "fused"], ["qkv"]),
        helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3),
        helper.make_node("Unsqueeze", ["k", "one"], ["k4"]),
        helper.make_node("Concat", ["past_key_values.0.key", "k4"], ["present.0.key"], axis=2),
        helper.make_node("Unsqueeze", ["v", "one"], ["v4"]),
        helper.make_node("Concat", ["past_key_values.0.value", "v4"], ["present.0.value"], axis=2),
        helper.make_node("ReduceSum", ["present.0.value", "axes"], ["sum"], keepdims=1),
        helper.make_node("Squeeze", ["sum", "one"], ["mixed"]),
        helper.make_node("Mul", ["mixed", "q"], ["attended"]),
        helper.make_node("Add", ["x", "attended"], ["h"]),
        helper.make_node("LayerNormalization", ["h", "scale", "offset"], ["m"]),
        helper.make_node("MatMul", ["m", "up"], ["u"]),
        helper.make_node("Gelu", ["u"], ["g"]),
        helper.make_node("MatMul", ["g", "down"], ["d"]),
        helper.make_node("Add", ["h", "d"], ["logits"]),
    ]
    weights = _weights(words=(10, 4), places=(20, 4), scale=(4,), offset=(4,), fused=(4, 12), up=(4, 16), down=(16, 4))
    weights += [numpy_helper.from_array(np.array([number]), name) for name, number in (("one", 1), ("axes", 2))]
    cache = [f"past_key_values.0.{part}" for part in ("key", "value")]
    inputs = [_tokens(), _tokens("position_ids"), *(_floats(name, "batch", 1, "past", 4) for name in cache)]
    outputs = [_floats("logits", "batch", "sequence", 4)]
    outputs += [_floats(name.replace("past_key_values", "present"), "batch", 1, "total", 4) for name in cache]
    return _saved(tmp_path, nodes, inputs, outputs, weights)


_ATTENTION = """
    n0 = RMSNormalization (x0, scale)
    q0 = MatMul (n0, square)
    k0 = MatMul (n0, square)
    v0 = MatMul (n0, square)
    a0, present_key, present_value = Attention <q_num_heads = 1, kv_num_heads = 1, is_causal = 1>
        (q0, k0, v0, , past_key, past_value)
    o0 = MatMul (a0, square)
    h0 = Add (x0, o0)
"""


def _decoder(tmp_path, body, inputs="", weights=""):
    """A decoder of one layer: its attention is a Llama's, and what follows is the body, from h0 to y."""
    cache = ", ".join(f"float[batch, 1, past, 4] past_{part}" for part in ("key", "value"))
    present = ", ".join(f"float[batch, 1, total, 4] present_{part}" for part in ("key", "value"))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        decoder (int64[batch, sequence] input_ids, {cache}{inputs})
            => (float[batch, sequence, 4] logits, {present})
            <float[10, 4] words = {{{", ".join(["0.5"] * 40)}}}, float[4] scale = {{1, 1, 1, 1}},
             float[4, 4] square = {{{", ".join(["0.1"] * 16)}}}, float[4, 1] first = {{1, 2, 3, 4}}{weights}>
        {{
            x0 = Gather (words, input_ids)
            {_ATTENTION}
            {body}
            z = RMSNormalization (y, scale)
            logits = MatMul (z, square)
        }}"""
    )
    model = ir.from_proto(model)  # ONNX's text form has no such names
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = NAMES.get(value.name, value.name)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    ir.save(model, tmp_path / "other.onnx")
    return tmp_path / "other.onnx"


def _experts(tmp_path):
    """Mixtral-like: a token's MLP is a weighted sum of two."""
    expert = """
    g{e} = MatMul (m, square)
    s{e} = Sigmoid (g{e})
    w{e} = Mul (g{e}, s{e})
    u{e} = MatMul (m, square)
    p{e} = Mul (w{e}, u{e})
    d{e} = MatMul (p{e}, square)
    c{e} = MatMul (m, first)
    t{e} = Sigmoid (c{e})
    e{e} = Mul (t{e}, d{e})
    """
    experts = "".join(expert.format(e=number) for number in (1, 2))
    return _decoder(tmp_path, f"m = RMSNormalization (h0, scale) {experts} e = Add (e1, e2) y = Add (h0, e)")


def _cross_attending(tmp_path):
    """A decoder like Whisper's: between attention and MLP, each layer attends to what an encoder heard."""
    body = """
    m = RMSNormalization (h0, scale)
    cq = MatMul (m, square)
    ck = MatMul (encoder_hidden_states, square)
    cv = MatMul (encoder_hidden_states, square)
    c = Attention <q_num_heads = 1, kv_num_heads = 1> (cq, ck, cv)
    co = MatMul (c, square)
    ch = Add (h0, co)
    f = RMSNormalization (ch, scale)
    u = MatMul (f, square)
    g = Gelu (u)
    d = MatMul (g, square)
    y = Add (ch, d)
    """
    return _decoder(tmp_path, body, inputs=", float[batch, heard, 4] encoder_hidden_states")


OTHERS = {
    "convolutional": (_convolutional, "no residual stream .* no Gather looks up"),
    "encoder": (_encoder, "no residual stream .* nothing adds a branch back"),
    "learned_positions": (_learned_positions, "nothing adds a branch back to the embedding output 'w'"),
    "experts": (_experts, "the MLP of layer 0 ends in 4 matrices.*expected one, down_proj"),
    "cross_attending": (_cross_attending, "residual block 2 .* is an MLP block .* expected attention"),
}


@pytest.mark.parametrize(("make", "reason"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("injects", [False, True])
def test_graph_is_refused_by_what_it_lacks_when_it_is_no_llama(foreign, tmp_path, make, reason, injects):
    graph, adapter = make(tmp_path), foreign.adapter
    if not injects:
        adapter = tmp_path / "routers"
        router = {"model.routers.0.weight": ArrayTensor(np.ones((1, 4), np.float32))}
        save_adapter(DloAdapter("mlp", (True,), tensors=router), adapter)
    with pytest.raises(InputError, match=reason) as refusal:
        foreign.export(graph, tmp_path / "out", adapter=adapter)
    assert refusal.value.hint
    assert not (tmp_path / "out").exists()
