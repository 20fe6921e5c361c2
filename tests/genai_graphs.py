"""Tiny graphs as onnxruntime-genai's model builder makes them: packed, fused, quantised."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

from onnxruntime_genai.models.builder import create_model, parse_extra_options

from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

# The builder's own options that make another form of the same model.
FORMS = {
    "fp32": ("fp32", "cpu"),
    "fp32, apart": ("fp32", "cpu", "disable_qkv_fusion=true"),
    "fp16": ("fp16", "cuda"),
    "int4": ("int4", "cpu"),
    "int4, apart": ("int4", "cpu", "disable_qkv_fusion=true"),
    "int4, gate and up packed": ("int4", "cpu", "fuse_mlp_gate_up=true"),
    "int4, zero points": ("int4", "cpu", "is_symmetric=false"),
    "int4, DequantizeLinear": ("int4", "cpu", "use_qdq=true"),
    "int8": ("int8", "cpu"),
    "fp32, biases": ("fp32", "cpu"),
    "int4, biases": ("int4", "cpu"),
    # Of a checkpoint whose head is the embedding; its codes are shared too.
    "fp32, tied": ("fp32", "cpu"),
    "int4, tied": ("int4", "cpu"),
}
LAST_LOGITS = "fp32, last logits"
"""Whose head runs for a step's last token alone."""
INT4_FLOAT16 = "int4, float16"
"""Whose activations are float16 and rounded to 8 bits where they are multiplied: made for WebGPU."""
_ALL_FORMS = FORMS | {
    LAST_LOGITS: ("fp32", "cpu", "prune_lm_head=true"),
    INT4_FLOAT16: ("int4", "webgpu"),
}


def build(checkpoint: Path, output: Path, form: str) -> Path:
    """Runs the builder on a checkpoint; returns the graph.

    Args:
        checkpoint: Its folder.
        output: Created.
        form: A key of FORMS, LAST_LOGITS or INT4_FLOAT16.
    """
    precision, provider, *options = _ALL_FORMS[form]
    arguments = ("", str(checkpoint), str(output), precision, provider, str(output.with_name("cache")))
    quantizer = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        quantizer.setLevel(logging.WARNING)
        create_model(*arguments, **parse_extra_options(*arguments, list(options)))
    return output / "model.onnx"


def save_genai_graph(folder: Path, form: str, layers: int = 3) -> Path:
    """Writes a checkpoint, and the graph the builder makes of it, with what it puts beside.

    Args:
        folder: Created.
        form: A key of FORMS, LAST_LOGITS or INT4_FLOAT16.
        layers: Decoder layers.

    Returns:
        The .onnx file; the checkpoint is the folder "checkpoint" beside its folder.
    """
    sizes = {"hidden": 64, "intermediate": 96, "layers": layers, "vocab": BYTE_VOCABULARY}
    biases = "biases" in form
    checkpoint = save_tiny_llama(
        folder / "checkpoint", **sizes, tie="tied" in form, attention_bias=biases, mlp_bias=biases, tokenizer=True
    )
    return build(checkpoint, folder / "graph", form)
