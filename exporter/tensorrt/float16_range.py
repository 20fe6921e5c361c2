"""Whether float16 holds a model's residual stream: measured before an engine is built in it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_runner import exposed_model
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.runtimes.artefact.description import MODEL_NAME
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner

LARGEST = 65504.0  # of float16
# A stream that comes this near on a few tokens may get over it on others.
_NEAR = 0.5
_TOKENS = 64


def float16_stream_peak(folder: Path, config: LlamaConfig) -> float:
    """The largest magnitude in the residual stream of the artefact's fp32 graph.

    Massive activations show on any tokens, first on the sequence's first one; these are the model's first token and
    random ones.

    Args:
        folder: The artefact, `model.onnx` in fp32.
        config: Of its source.

    Raises:
        InputError: float16 cannot hold it.
    """
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, _TOKENS))
    if config.bos_token_id is not None:
        tokens[0, 0] = config.bos_token_id
    model = exposed_model(load_graph(folder / MODEL_NAME), streams=True)
    with OnnxRuntimeRunner(model, weights_folder=folder, name="stream", allow_spinning=False) as runner:
        runner.reset(1)
        result = runner.step(tokens, np.ones_like(tokens), np.arange(_TOKENS)[np.newaxis], hidden_states=True)
    peaks = {layer: float(np.abs(stream).max()) for layer, stream in result.hidden_states.items()}
    # NaN is neither more nor less than any number: it is taken for the largest, or it would be passed over.
    layer = max(peaks, key=lambda index: math.inf if math.isnan(peaks[index]) else peaks[index])
    if not peaks[layer] < LARGEST:
        raise InputError(
            f"--dtype fp16: the residual stream reaches {peaks[layer]:.0f} behind layer {layer}, float16 ends at "
            f"{LARGEST:.0f}",
            hint="use --dtype bf16, which has fp32's range",
        )
    return peaks[layer]


def near_overflow(peak: float) -> bool:
    """Whether a stream's peak leaves too little room to be sure of other texts."""
    return peak > _NEAR * LARGEST
