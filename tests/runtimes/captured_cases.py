"""Decoders at fixed shapes and the model they are of, fed alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from tests.tiny_models import save_tiny_llama

LENGTHS = (5, 1, 8)
STEPS = 6
CAPACITY = 14  # what the longest prompt and the steps need


def tiny_model(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> LlamaDloForCausalLM:
    """Three layers, the outer two routed, with a threshold of its own on the last."""
    settings = {"routed": (True, False, True), "thresholds": {2: 0.45}, "rope": "llama3", "head_dim": 12} | options
    model: LlamaDloForCausalLM = AutoModelForCausalLM.from_pretrained(save_tiny_llama(folder, **settings), dtype=dtype)  # type: ignore[arg-type]
    return model.eval()


def tokens_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3))


def model_outputs(
    model: LlamaDloForCausalLM, lengths: Sequence[int] = LENGTHS, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model itself says of every sequence, alone and at once.

    Returns:
        Logits behind each prompt and each step, float32 [1 + steps, batch, vocabulary]; decode's scores, float32
        [steps, layers, batch].
    """
    ids = tokens_of(len(lengths), max(lengths) + steps)
    logits, scores = [], []
    for row, length in enumerate(lengths):
        with torch.inference_mode():
            output = model(input_ids=ids[row : row + 1, : length + steps])
        logits.append(output.logits[0, length - 1 :].float())
        scores.append(torch.stack([made[0, length:] for made in output.router_scores.values()]))
    return torch.stack(logits, 1), torch.stack(scores).permute(2, 1, 0)


def decoder_outputs(
    decoder: CapturedDecoder, lengths: Sequence[int] = LENGTHS, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a decoder."""
    ids = tokens_of(len(lengths), max(lengths) + steps)
    logits = [decoder.prefill(ids[:, : max(lengths)], lengths).logits.float().cpu()]
    scores = []
    for step in range(steps):
        output = decoder.decode(torch.stack([ids[row, length + step] for row, length in enumerate(lengths)]))
        logits.append(output.logits.float().cpu().clone())
        scores.append(torch.stack([made[:, 0].cpu().clone() for made in output.scores.values()]))
    return torch.stack(logits), torch.stack(scores)
