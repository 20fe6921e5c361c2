"""How long a dense decode step of transformers takes on a GPU: what captured decode is held against."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.pytorch_times import CAPACITY, CONTEXT, block_us, spread


def outside_reference(evidence: Evidence, config: dict[str, Any], smoke: bool) -> None:
    """Dense decode by transformers with its static cache: as it comes, and compiled by PyTorch."""
    from transformers import LlamaConfig as TransformersConfig  # noqa: PLC0415 - heavy, and only here
    from transformers import LlamaForCausalLM, StaticCache  # noqa: PLC0415

    values = {key: value for key, value in config.items() if key not in {"model_type", "architectures"}}
    with torch.device("cuda"):
        model = LlamaForCausalLM(TransformersConfig(**values, dtype=torch.bfloat16))
    cast("nn.Module", model).to(torch.bfloat16).eval()
    ids = torch.randint(0, config["vocab_size"], (1, CONTEXT), device="cuda")
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    needed = 12 if smoke else 60  # to compile
    for name, forward, seconds in (
        ("transformers, eager", model.forward, 3),
        ("transformers, compiled", compiled, needed),
    ):
        if not evidence.fits(name, seconds):
            continue
        with evidence.guard("outside reference", subject=name), torch.inference_mode():
            begin = time.monotonic()
            cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            token, place = ids[:, :1].clone(), torch.full((1, 1), CONTEXT, device="cuda")

            def step(forward: Any = forward, cache: Any = cache, token: Any = token, place: Any = place) -> None:
                forward(input_ids=token, position_ids=place, past_key_values=cache, logits_to_keep=1)
                place.add_(1)

            for _ in range(3):
                step()
            torch.cuda.synchronize()
            warm = time.monotonic() - begin
            times = np.array([block_us(step, 4) * 1e-3 for _ in range(2 if smoke else 8)])
            evidence.row(
                "outside reference", model="1B", batch=1, subject=name, ms=spread(times), warm_up_s=round(warm, 1)
            )
