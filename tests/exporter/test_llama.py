"""The plain graph against transformers: same logits for every supported configuration."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.plain_graph.llama import plain_graph
from tests.graph_passes.harness import run_model
from tests.tiny_models import save_tiny_llama

VARIANTS = {
    "default": {},
    "tied": {"tie": True},
    "head_dim": {"head_dim": 16},
    "one_kv_head": {"kv_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope_linear": {"rope": "linear"},
    "rope_llama3": {"rope": "llama3"},
    "legacy_keys": {"legacy_keys": True, "rope": "llama3"},
    "sharded": {"shards": 3},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_graph_equals_transformers_when_prefilled_padded_and_cached(variant, tmp_path):
    folder = save_tiny_llama(tmp_path / "model", **VARIANTS[variant])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open_checkpoint(folder) as checkpoint:
        model = plain_graph(checkpoint.config, checkpoint.tensors)
        config = checkpoint.config
        ids = np.random.default_rng(0).integers(
            0, config.vocab_size, (2, 23)
        )  # beyond the original context of rope_llama3
        mask = np.ones_like(ids)
        mask[1, :4] = 0
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        with torch.inference_mode():
            expected = reference(
                torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
            ).logits.numpy()
        cache = {
            f"past_key_values.{i}.{kind}": np.zeros((2, config.num_kv_heads, 0, config.head_dim), np.float32)
            for i in range(config.num_layers)
            for kind in ("key", "value")
        }
        got = []
        for start, stop in ((0, 14), (14, 15), (15, 23)):
            feeds = {
                "input_ids": ids[:, start:stop],
                "attention_mask": mask[:, :stop],
                "position_ids": positions[:, start:stop],
            }
            outputs = run_model(model, feeds | cache)
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            got.append(outputs["logits"])
        logits = np.concatenate(got, axis=1)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_plain_graph_is_valid_when_built_in_16_bits(dtype, tmp_path):
    with open_checkpoint(save_tiny_llama(tmp_path / "model", tie=True, attention_bias=True)) as checkpoint:
        proto = ir.to_proto(plain_graph(checkpoint.config, checkpoint.tensors, dtype))
    onnx.checker.check_model(proto, full_check=True)
    inputs = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    assert inputs["past_key_values.0.key"] == dtype.value
    assert inputs["input_ids"] == onnx.TensorProto.INT64
