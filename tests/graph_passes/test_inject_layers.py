from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.depth.layer_init import LAYER_INITS
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass, LayerInjection
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes import golden_graphs
from tests.graph_passes.harness import as_text, check_idempotence
from tests.graph_passes.injections import injected_weights, injection_pass
from tests.initial_arrays import init_tensor


def _model(depth: int = 1) -> ir.Model:
    """The one-layer Llama, deepened by layers with random weights."""
    model = ir.from_onnx_text(golden_graphs.source_text())
    if depth > 1:
        plan = [(position, 0) for position in range(1, depth)]
        injection_pass(model, plan, "random", seed=7, initializer_range=0.5)(model)
        model.metadata_props.clear()
        for node in model.graph:
            node.metadata_props.clear()
    return model


def _inject(model: ir.Model, plan: Sequence[tuple[int, int]], init: str = "zero_out") -> InjectLayersPass:
    pass_ = injection_pass(model, plan, init)
    assert pass_(model).modified
    return pass_


@pytest.mark.parametrize("plan", [[(1, 0)], [(0, 0)], [(2, 1), (3, 1)], [(0, 1)], [(1, 0), (3, 1)]])
def test_injection_numbers_layers_and_interface_in_order_when_plan_is(plan: list[tuple[int, int]]) -> None:
    model = _model(2)
    pass_ = _inject(model, plan)
    depth = 2 + len(plan)
    layers = find_decoder_layers(model.graph)
    assert len(layers) == depth
    parts = [f"{index}.{part}" for index in range(depth) for part in ("key", "value")]
    assert [value.name for value in model.graph.inputs][3:] == [f"past_key_values.{part}" for part in parts]
    assert [value.name for value in model.graph.outputs][1:] == [f"present.{part}" for part in parts]
    for layer in layers:
        for projection in layer.projections.values():
            assert projection.weight.name == f"model.layers.{layer.index}.{projection.tensor}"
    check_idempotence(model, pass_)


@pytest.mark.parametrize("init", LAYER_INITS)
def test_injected_weights_follow_from_the_sources_when_init_is(init: str) -> None:
    originals = [layer.projections for layer in find_decoder_layers(_model(2).graph)]
    model = _model(2)
    _inject(model, [(2, 1)], init)
    injected = find_decoder_layers(model.graph)[2].projections
    for role, projection in injected.items():
        source, previous = (originals[index][role].weight.const_value.numpy().T for index in (1, 0))
        expected = init_tensor(init, projection.tensor, source, previous, seed=(0, 2))
        found = projection.weight.const_value.numpy()
        np.testing.assert_array_equal(found, expected.T, err_msg=role)


def test_injected_weights_are_lazy_when_pass_has_run() -> None:
    model = _model()
    _inject(model, [(1, 0)], "copy")
    (first, second) = find_decoder_layers(model.graph)
    copied = second.projections["gate_proj"].weight.const_value
    assert isinstance(copied, ir.LazyTensor)
    assert not np.shares_memory(copied.numpy(), first.projections["gate_proj"].weight.const_value.numpy())


def test_given_weights_are_used_when_they_come_with_the_layer() -> None:
    model = _model()
    (layer,) = find_decoder_layers(model.graph)
    weights = injected_weights(model, 1, 0, "random", seed=3)
    assert len(weights) == len(layer.projections)
    InjectLayersPass((LayerInjection(1, 0, weights),))(model)
    for projection in find_decoder_layers(model.graph)[1].projections.values():
        np.testing.assert_array_equal(projection.weight.const_value.numpy(), weights[projection.tensor].T)


WEIGHTS = injected_weights(_model(), 1, 0, "copy")
REFUSED = {
    "nothing": ([], "no layers were given"),
    "position": ([LayerInjection(2, 0, WEIGHTS)], "position 2 is out of range, expected 0 to 1"),
    "twice": ([LayerInjection(1, 0, WEIGHTS), LayerInjection(1, 0, WEIGHTS)], "position 1 is given twice"),
    "source": ([LayerInjection(1, 4, WEIGHTS)], "layer 1 derives from layer 4, expected 0 to 0"),
    "shape": (
        [LayerInjection(1, 0, weights={"mlp.up_proj.weight": np.zeros((4, 3))})],
        "mlp.up_proj.weight has shape (4, 3), expected (3, 4)",
    ),
    "missing": ([LayerInjection(1, 0, weights={})], "mlp.down_proj.weight has shape missing, expected (4, 3)"),
    "surplus": (
        [LayerInjection(1, 0, weights={"mlp.router.weight": np.zeros(4)})],
        "mlp.router.weight has shape (4,), expected no such tensor",
    ),
}


@pytest.mark.parametrize(("layers", "reason"), REFUSED.values(), ids=REFUSED)
def test_injection_refuses_with_the_reason_when_request_is(layers: list[LayerInjection], reason: str) -> None:
    model = _model()
    before = as_text(model)
    with pytest.raises(GraphPassError, match="InjectLayersPass: ") as error:
        InjectLayersPass(tuple(layers))(model)
    assert reason in str(error.value)
    assert as_text(model) == before


def test_injection_refuses_when_graph_is_routed_already() -> None:
    model = _model()
    RouteLayersPass(golden_graphs.ROUTERS)(model)
    with pytest.raises(GraphPassError, match="InjectLayersPass: RouteLayersPass ran before, expected after it"):
        InjectLayersPass((LayerInjection(1, 0, WEIGHTS),))(model)


def test_injection_refuses_when_other_layers_were_injected_before() -> None:
    model = _model()
    _inject(model, [(1, 0)])
    with pytest.raises(GraphPassError, match="InjectLayersPass: ran on this graph before"):
        InjectLayersPass((LayerInjection(0, 0, WEIGHTS),))(model)


def test_injection_refuses_when_layer_holds_a_subgraph() -> None:
    branch = 'then_branch = t () => (float[B,S,3] r) { r = Identity ("model.layers.0.mlp.gate_silu") }'
    text = golden_graphs.source_text().replace(
        'Mul ("model.layers.0.mlp.gate_silu", "model.layers.0.mlp.up_proj")',
        f"If <{branch}, {branch.replace('then_branch = t', 'else_branch = e')}> (yes)",
    )
    model = ir.from_onnx_text(text.replace("float visible = {0}", "float visible = {0}, bool yes = {1}"))
    with pytest.raises(GraphPassError, match=r"If node .* of layer 0 holds a subgraph"):
        InjectLayersPass((LayerInjection(1, 0, WEIGHTS),))(model)


def test_injection_keeps_keys_before_values_when_the_interface_lists_them_so() -> None:
    model = _model(2)
    for interface, first in ((model.graph.inputs, 3), (model.graph.outputs, 1)):
        interface[first:] = sorted(interface[first:], key=lambda value: value.name.endswith("value"))
    _inject(model, [(1, 0)])
    parts = [f"{index}.{part}" for part in ("key", "value") for index in range(3)]
    assert [value.name for value in model.graph.inputs][3:] == [f"past_key_values.{part}" for part in parts]
    assert [value.name for value in model.graph.outputs][1:] == [f"present.{part}" for part in parts]
