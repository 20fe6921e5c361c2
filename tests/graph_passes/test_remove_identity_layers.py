"""Layers go only where it is proven that they add nothing, and the rest computes what it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.graph_passes.depth.remove_identity_layers import RemoveIdentityLayersPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes import golden_graphs
from tests.graph_passes.harness import check_idempotence, run_model
from tests.graph_passes.injections import injection_pass

FEEDS = {
    "input_ids": np.array([[1, 2, 0, 3]]),
    "attention_mask": np.ones((1, 6), np.int64),
    "position_ids": np.array([[2, 3, 4, 5]]),
}
DOWN = "model.layers.{}.mlp.down_proj"


def deepened(*plan: tuple[int, int], init: str = "zero_out") -> ir.Model:
    """The one-layer Llama with layers inserted."""
    model = ir.from_onnx_text(golden_graphs.source_text())
    injection_pass(model, plan, init)(model)
    return model


def caches(layers: int) -> dict[str, np.ndarray]:
    """Two cached tokens for each layer, other ones for each."""
    rng = np.random.default_rng(0)
    names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return {name: rng.standard_normal((1, 1, 2, 2)).astype(np.float32) for name in names}


def test_layers_leave_everything_else_as_it_was_when_they_are_removed() -> None:
    model, past = deepened((0, 0), (2, 0), (3, 0)), caches(4)
    before = run_model(model, {**FEEDS, **past})
    pass_ = RemoveIdentityLayersPass((0, 3))
    assert pass_(model).modified
    check_idempotence(model, pass_)
    kept = {1: 0, 2: 1}
    renamed = {
        f"past_key_values.{new}.{part}": past[f"past_key_values.{old}.{part}"]
        for old, new in kept.items()
        for part in ("key", "value")
    }
    after = run_model(model, {**FEEDS, **renamed})
    np.testing.assert_array_equal(after["logits"], before["logits"])
    for old, new in kept.items():
        np.testing.assert_array_equal(after[f"present.{new}.key"], before[f"present.{old}.key"])
    # What is left is numbered as if it had always been so: weights, tags, interface.
    assert not [name for name in model.graph.initializers if "layers.2" in name or "layers.3" in name]
    assert {node.metadata_props.get("dlo.layer") for node in model.graph} == {None, "1"}
    assert len(find_decoder_layers(model.graph)) == 2


def test_removed_layers_leave_nothing_of_the_injection_when_all_of_it_goes() -> None:
    model = deepened((1, 0), (2, 0))
    RemoveIdentityLayersPass((1, 2))(model)
    source = ir.from_onnx_text(golden_graphs.source_text())
    assert [(node.op_type, node.name) for node in model.graph] == [(node.op_type, node.name) for node in source.graph]
    assert set(model.graph.initializers) == set(source.graph.initializers)


@pytest.mark.parametrize("value", [1e-30, np.nan])
def test_layer_stays_when_one_number_of_its_last_projection_is_not_zero(value: float) -> None:
    model = deepened((1, 0))
    weight = model.graph.initializers[f"{DOWN.format(1)}.weight"]
    array = np.array(weight.const_value.numpy())
    array[-1, -1] = value
    weight.const_value = ir.tensor(array, name=weight.name)
    with pytest.raises(GraphPassError, match=r"layer 1: mlp\.down_proj\.weight is not all zeros"):
        RemoveIdentityLayersPass((1,))(model)


def test_layer_stays_when_something_may_come_of_nothing_behind_its_last_projection() -> None:
    model = deepened((1, 0))
    (_, layer) = find_decoder_layers(model.graph)
    node = ir.node("Cos", [layer.mlp.branch], name="cosine")
    node.outputs[0].name = "cosine"
    model.graph.insert_before(layer.mlp.add, node)
    layer.mlp.add.replace_input_with(1, node.outputs[0])
    with pytest.raises(GraphPassError, match=r"'cosine' .*stands between mlp\.down_proj\.weight and the stream"):
        RemoveIdentityLayersPass((1,))(model)


@pytest.mark.parametrize("to", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_layer_goes_when_the_addition_reads_the_stream_cast_to_its_own_type_and_no_other(to: ir.DataType) -> None:
    # As exporters write where a norm computes in float32: the addition reads what the norm does.
    model = deepened((1, 0))
    (_, layer) = find_decoder_layers(model.graph)
    cast = ir.node("Cast", [layer.mlp.stream_in], {"to": to}, name="widened")
    cast.outputs[0].name = "widened"
    model.graph.insert_before(layer.mlp.nodes[0], cast)
    layer.mlp.add.replace_input_with(0, cast.outputs[0])
    if to == ir.DataType.FLOAT:
        assert RemoveIdentityLayersPass((1,))(model).modified
        return
    with pytest.raises(GraphPassError, match=r"layer 1: Cast node 'widened' .*changes the type of the stream in front"):
        RemoveIdentityLayersPass((1,))(model)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0,), "layer 0: self_attn.o_proj.weight is not all zeros; layer 0: mlp.down_proj.weight is not"),
        ((7,), "layer 7 does not exist, expected 0 to 1"),
        ((0, 1), "all 2 layers were given"),
        ((), "no layers were given"),
    ],
)
def test_removal_is_refused_with_every_reason_when(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(GraphPassError, match=message):
        RemoveIdentityLayersPass(layers)(deepened((1, 0)))


def test_removal_is_refused_when_layers_are_routed_already() -> None:
    model = deepened((1, 0))
    RouteLayersPass({0: np.ones(4, np.float32)})(model)
    with pytest.raises(GraphPassError, match="RouteLayersPass ran before, expected after it"):
        RemoveIdentityLayersPass((1,))(model)
