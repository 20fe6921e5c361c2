"""Exports a checkpoint with torch.onnx.export(dynamo=True), its cache as inputs and outputs.

python dynamo.py CHECKPOINT GRAPH ATTENTION
"""

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

checkpoint, graph, attention = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=attention, dtype=torch.float32).eval()
layers, config = range(model.config.num_hidden_layers), model.config
parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]


class WithCache(torch.nn.Module):
    """The model, its cache spread out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache(config=config)
        for layer, keys, values in zip(cache.layers, past[::2], past[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        present = [state for layer in output.past_key_values.layers for state in (layer.keys, layer.values)]
        return output.logits, *present


batch, past, step = 2, 4, 3
cached = [torch.randn(batch, config.num_key_value_heads, past, config.head_dim) for _ in parts]
positions = torch.arange(past, past + step).repeat(batch, 1)
inputs = (torch.zeros_like(positions), torch.ones(batch, past + step, dtype=torch.int64), positions, *cached)
vary = torch.export.Dim.DYNAMIC
torch.onnx.export(
    WithCache(),
    inputs,
    graph,
    dynamo=True,
    input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts)],
    output_names=["logits", *(f"present.{part}" for part in parts)],
    dynamic_shapes=(*[{0: vary, 1: vary}] * 3, tuple({0: vary, 2: vary} for _ in parts)),
)
