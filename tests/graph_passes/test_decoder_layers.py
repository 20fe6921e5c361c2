from __future__ import annotations

import itertools

import onnx_ir as ir
import pytest

from dlo_export.graph_passes.errors import DecoderLayersNotFound, GraphPassError
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer, find_decoder_layers
from tests.graph_passes import golden_graphs
from tests.graph_passes.graphs import MLP, tiny_decoder


def _layers(text: str) -> tuple[DecoderLayer, ...]:
    return find_decoder_layers(ir.from_onnx_text(text).graph)


def test_finder_separates_attention_and_mlp_when_layer_is_plain() -> None:
    (layer,) = _layers(tiny_decoder())
    assert (layer.input.name, layer.attention.stream_out.name, layer.output.name) == ("x", "h", "y")
    assert [node.op_type for node in layer.mlp.nodes] == ["RMSNormalization", "MatMul", "Sigmoid", "MatMul"]
    assert layer.mlp.branch.name == "d"
    assert (layer.past_key.name, layer.present_value.name) == ("past_key_values.0.key", "present.0.value")
    assert (layer.token_dims, layer.hidden_size) == (("B", "S"), 2)


def test_finder_ignores_names_when_all_are_meaningless() -> None:
    text = golden_graphs.source_text().replace("model.layers.0.", "v").replace("mlp_residual", "q_proj_0")
    (layer,) = _layers(text)
    assert layer.projections["down_proj"].weight.name == "vmlp.down_proj.weight"


def test_finder_follows_the_stream_when_it_passes_through_casts() -> None:
    mlp = "c = Cast <to = 1> (h)\n  " + MLP.replace("(h, norm)", "(c, norm)")
    (layer,) = _layers(tiny_decoder(mlp, "y = Add (c, d)"))
    assert layer.mlp.stream_in.name == "h"
    assert layer.mlp.stream_operand.name == "c"
    assert "Cast" in [node.op_type for node in layer.mlp.nodes]


def test_finder_reads_compacted_blocks_when_they_scatter_into_the_stream() -> None:
    (layer,) = find_decoder_layers(golden_graphs.golden_graph("lower_skip_to_compaction").graph)
    assert layer.mlp.add.op_type == "ScatterND"
    assert layer.mlp.stream_operand is layer.mlp.stream_in


def test_finder_leaves_shared_lengths_out_of_the_layer_when_they_hang_off_the_embedding() -> None:
    mlp = f"shape = Shape (x)\n  {MLP}"
    (layer,) = _layers(tiny_decoder(mlp, "y = Add (h, d)\n  again = Reshape (y, shape)"))
    assert "Shape" not in [node.op_type for node in layer.nodes]


NEAR_MISSES = {
    "embedding": (tiny_decoder().replace("Gather (table, ids)", "Expand (table, ids)"), "no Gather looks up"),
    "no_cache": (
        tiny_decoder().replace("past_key_values.0", "old").replace("present.0", "new"),
        "none of the 2 residual blocks reads past_key_values",
    ),
    "parallel": (tiny_decoder(add="sum = Add (mixed, d)\n  y = Add (x, sum)"), "the residual stream forks at 'x'"),
    "fork": (tiny_decoder(add="y = Add (h, d)\n  z = Add (h, n)"), "the residual stream forks at 'h'"),
    "no_residual": (tiny_decoder(add="y = Identity (d)"), "ends after attention"),
    "numbering": (
        tiny_decoder().replace("past_key_values.0", "past_key_values.7").replace("present.0", "present.7"),
        "expected 'past_key_values.0.key'",
    ),
    "skip_norm": (
        tiny_decoder(
            "n, m, v, r = com.microsoft.SkipSimplifiedLayerNormalization (h, mixed, norm)",
            "y = Identity (r)",
        ).replace("h = Add (x, mixed)", "h = Identity (x)"),
        "adds to the residual stream and normalises it in one node",
    ),
}


@pytest.mark.parametrize(("text", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_finder_refuses_with_the_reason_when_there_is_no_decoder_layer(text: str, reason: str) -> None:
    with pytest.raises(DecoderLayersNotFound, match="find_decoder_layers: ") as error:
        _layers(text)
    assert reason in str(error.value)


def test_projections_are_told_apart_when_layer_is_a_llama() -> None:
    (layer,) = _layers(golden_graphs.source_text())
    prefix = "model.layers.0."
    assert {role: projection.weight.name for role, projection in layer.projections.items()} == {
        role: prefix + tensor
        for role, tensor in {
            "q_proj": "self_attn.q_proj.weight",
            "k_proj": "self_attn.k_proj.weight",
            "v_proj": "self_attn.v_proj.weight",
            "o_proj": "self_attn.o_proj.weight",
            "gate_proj": "mlp.gate_proj.weight",
            "up_proj": "mlp.up_proj.weight",
            "down_proj": "mlp.down_proj.weight",
            "input_layernorm": "input_layernorm.weight",
            "post_attention_layernorm": "post_attention_layernorm.weight",
        }.items()
    }
    assert all(
        projection.tensor == projection.weight.name.removeprefix(prefix) for projection in layer.projections.values()
    )


def test_projections_follow_transposes_and_biases_when_weights_are_prepared() -> None:
    name = "model.layers.0.mlp.up_proj"
    text = golden_graphs.source_text().replace(
        f'"{name}" = MatMul ("model.layers.0.post_attention_layernorm", "{name}.weight")',
        f"""turned = Transpose <perm = [1, 0]> ("{name}.weight")
  product = MatMul ("model.layers.0.post_attention_layernorm", turned)
  "{name}" = Add (product, bias)""",
    )
    text = text.replace(f'float[4,3] "{name}.weight"', f'float[3] bias = {{1,2,3}},\n  float[3,4] "{name}.weight"')
    (layer,) = _layers(text)
    assert layer.projections["up_proj"].storage.layout == "out_in"
    assert layer.projections["up_proj.bias"].weight.name == "bias"
    assert layer.projections["up_proj.bias"].tensor == "mlp.up_proj.bias"


def test_projections_refuse_with_all_problems_when_mlp_is_not_gated() -> None:
    (layer,) = _layers(tiny_decoder())
    with pytest.raises(GraphPassError, match="layer 0") as error:
        _ = layer.projections
    for role in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
        assert role in str(error.value)


def test_projections_are_columns_of_one_matrix_when_query_key_and_value_are_fused() -> None:
    (apart,) = _layers(golden_graphs.source_text())
    (fused,) = find_decoder_layers(golden_graphs.golden_graph("fuse_sibling_matmuls").graph)
    roles = ("q_proj", "k_proj", "v_proj")
    assert len({fused.projections[role].storage for role in roles}) == 1
    ends = itertools.accumulate(apart.projections[role].contents.shape[0] for role in roles)
    assert [fused.projections[role].stop for role in roles] == list(ends)
    assert [fused.projections[role].start for role in roles] == [0, *(fused.projections[r].stop for r in roles[:2])]
