from __future__ import annotations

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.depth.layer_names import renumber_layers, renumbered
from dlo_export.graph_passes.naming import unique_names
from tests.graph_passes.graphs import tiny_decoder

NUMBERS = {1: 2, 2: 3, 11: 14}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        ("/model/layers.1/self_attn/q_proj/MatMul_output_0", "/model/layers.2/self_attn/q_proj/MatMul_output_0"),
        ("model.layers.11.mlp", "model.layers.14.mlp"),
        ("model.layers.2.mlp", "model.layers.3.mlp"),
        ("model.layers.1", "model.layers.2"),
        ("past_key_values.1.key", "past_key_values.2.key"),
        ("present.11.value", "present.14.value"),
        ("past_active.2", "past_active.3"),
        ("present_active.11", "present_active.14"),
        ("past_active.01", "past_active.01"),
        ("model.layers.111.mlp", "model.layers.111.mlp"),
        ("model.layers.10.mlp", "model.layers.10.mlp"),
        ("model.sublayers.1.mlp", "model.sublayers.1.mlp"),
        ("model.layers.1x.mlp", "model.layers.1x.mlp"),
        ("present.1.key_scale", "present.1.key_scale"),
        ("onnx::MatMul_1", "onnx::MatMul_1"),
        ("layers.1\u0661.mlp", "layers.1\u0661.mlp"),
        (f"layers.{'9' * 5000}.mlp", f"layers.{'9' * 5000}.mlp"),
    ],
)
def test_renumbering_is_anchored_when_name_is(name: str, expected: str) -> None:
    assert renumbered(name, NUMBERS) == expected


def test_renumbering_swaps_initializers_when_numbers_permute() -> None:
    text = tiny_decoder().replace("up)", '"layers.0.up")').replace("down)", '"layers.1.up")')
    text = text.replace("float[2,3] up", 'float[2,3] "layers.0.up"').replace(
        "float[3,2] down", 'float[3,2] "layers.1.up"'
    )
    graph = ir.from_onnx_text(text).graph
    before = {name: graph.initializers[name].const_value.shape for name in ("layers.0.up", "layers.1.up")}
    renumber_layers(graph, {0: 1, 1: 0})
    assert graph.initializers["layers.1.up"].const_value.shape == before["layers.0.up"]
    assert graph.initializers["layers.0.up"].const_value.shape == before["layers.1.up"]
    assert [value.name for value in graph.inputs][1] == "past_key_values.1.key"


def test_unique_names_remember_what_they_gave_when_asked_twice() -> None:
    unique = unique_names(ir.from_onnx_text(tiny_decoder()).graph)
    assert [unique("h"), unique("h"), unique("new"), unique("new")] == ["h_1", "h_2", "new", "new_1"]
