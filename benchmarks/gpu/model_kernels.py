"""The model class with its routed MLPs in the dlo kernels, held against itself in PyTorch's operators."""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.random_torch_llama import TINY, random_model
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.skip_kernels import SkipKernels

BARS: Final = {"float32": 2e-5, "bfloat16": 2**-5}
"""Largest difference of logits, of the largest: products sum in another order, and bfloat16 rounds elsewhere."""
_PROMPT, _STEPS = 12, 3


def check_model(evidence: Evidence, dtype: torch.dtype) -> None:
    """A model as `from_pretrained` gives it and as nobody set it, on the GPU: equal, turned, and never waiting.

    Decisions are given, the same to both: in 16 bits the two streams differ by a rounding, and one that falls on the
    other side of its threshold would say nothing of what is computed.
    """
    kind = str(dtype).removeprefix("torch.")
    with evidence.guard("model in the kernels", kind="model", dtype=kind), tempfile.TemporaryDirectory() as folder:
        random_model(TINY, routed=True, device="cpu", dtype=dtype).save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model.to("cuda")
        found = compare_with_itself(model, "auto")
        layers = len(model.config.routed_layers)
        asked = {"kernels": questions(model, "auto"), "plain": questions(model, False)}
        evidence.row(
            "model in the kernels",
            passed=found["error"] <= BARS[kind]
            and found["turned"] == layers
            # Whatever else waits does so either way.
            and asked["plain"] - asked["kernels"] >= layers,
            kind="model",
            dtype=kind,
            bar=BARS[kind],
            **found,
            questions=asked,
        )


def compare_with_itself(model: LlamaDloForCausalLM, wanted: SkipKernels) -> dict[str, Any]:
    """Prompts padded at the left, then steps behind them, a third of the decisions to skip.

    Args:
        model: Where it computes.
        wanted: Of `skip_kernels`, what is held against False.

    Returns:
        Largest difference by the largest logit, and how many layers' weights the kernels have read.
    """
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, model.config.vocab_size, (3, _PROMPT + _STEPS), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    active = torch.rand((model.config.num_hidden_layers, *ids.shape), generator=generator).to(model.device) > 1 / 3
    logits = []
    for choice in (False, wanted):
        model.skip_kernels = choice
        cache, parts = None, []
        for start, end in itertools.pairwise((0, *range(_PROMPT, _PROMPT + _STEPS + 1))):
            with torch.inference_mode():
                output = model(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                    force_active={layer: active[layer, :, start:end] for layer in model.config.routed_layers},
                )
            cache = output.past_key_values
            parts.append(output.logits.float())
        joined = torch.cat(parts, 1)
        logits.append(joined.masked_fill(mask[:, : joined.shape[1], None] == 0, 0))  # of padding nobody asks
    plain, kernels = logits
    layers = cast("Any", model.model.layers)
    turned = sum(not layers[layer].mlp.up_proj.weight.is_contiguous() for layer in model.config.routed_layers)
    return {"error": float((kernels - plain).abs().max() / plain.abs().max()), "turned": turned}


def questions(model: LlamaDloForCausalLM, wanted: SkipKernels) -> int:
    """How often the host waits for the GPU in a step, by PyTorch's own count."""
    model.skip_kernels = wanted
    ids = torch.arange(4, device="cuda")[None]
    with torch.inference_mode():
        model(input_ids=ids)  # what is compiled first waits too
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said, _sync_warnings():
            warnings.simplefilter("always")
            model(input_ids=ids)
    return sum("called a synchronizing" in str(warning.message) for warning in said)


@contextmanager
def _sync_warnings() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def generate_times(
    model: LlamaDloForCausalLM, skipped: np.ndarray, *, prompt: int, tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds per token of `generate()` behind a prompt, at the host's pace, both forms in turns.

    Args:
        model: On any device.
        skipped: bool [layers], whose MLPs no token gets, by thresholds that hardly any score exceeds.
        prompt: Tokens of it.
        tokens: To generate.
        rounds: Of each form, beside one to warm up.
    """
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=model.device)
    limits = {str(layer): 1 - 1e-6 if gone else 1e-6 for layer, gone in enumerate(skipped)}
    forms: dict[str, SkipKernels] = {"kernels": "auto", "plain": False}
    times: dict[str, list[float]] = {name: [] for name in forms}
    before, model.config.router_thresholds = model.config.router_thresholds, limits
    try:
        for _ in range(1 + rounds):
            for name, wanted in forms.items():
                model.skip_kernels = wanted
                begin = time.perf_counter()
                cast("Any", model).generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - begin) / tokens * 1e3)
    finally:
        model.config.router_thresholds = before
    kept = {name: np.array(values[1:]) for name, values in times.items()}
    return {
        name: {"ms": [round(float(value), 3) for value in np.percentile(values, (50, 10, 90))], "over_plain": ratio}
        for name, values in kept.items()
        for ratio in (round(float(np.median(values / kept["plain"])), 3),)
    }
