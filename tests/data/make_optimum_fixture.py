"""Make tests/data/optimum_llama: a tiny random Llama as optimum exports it (opset 18, decomposed attention and norms).

Runs in an environment of its own, because optimum-onnx needs an older transformers than this project:

    python3.11 -m venv optimum-env
    optimum-env/bin/pip install -r tests/data/make_optimum_fixture.requirements.txt
    optimum-env/bin/python tests/data/make_optimum_fixture.py

Writes model.onnx, config.json, model.safetensors (the same weights, for a reference), and expected.npz: what
transformers computes from it (`input_ids`, `attention_mask` with left padding, `position_ids`, `logits` of the whole
sequence).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from optimum.exporters.onnx import main_export
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent / "optimum_llama"
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


def make_model() -> LlamaForCausalLM:
    """A model with weights large enough that a wrong layer shows, and norms of both kinds.

    Layer 1 keeps norm weights of one, which optimum stores once and reads through Identity nodes.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            if ".layers.1." not in name:
                parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0.0, 0.15)
    return model


def expected_outputs(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Logits of two sequences, the second one padded at the left."""
    input_ids = torch.randint(0, CONFIG.vocab_size, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "logits": logits}
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def main() -> None:
    """Write the fixture."""
    model = make_model()
    with tempfile.TemporaryDirectory() as checkpoint, tempfile.TemporaryDirectory() as exported:
        model.save_pretrained(checkpoint)
        main_export(checkpoint, output=exported, task="text-generation-with-past", do_validation=False)
        FOLDER.mkdir(exist_ok=True)
        shutil.copyfile(Path(exported) / "model.onnx", FOLDER / "model.onnx")
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(checkpoint) / name, FOLDER / name)
    np.savez(FOLDER / "expected.npz", **expected_outputs(model))


if __name__ == "__main__":
    main()
