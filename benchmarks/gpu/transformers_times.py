"""How long a dense decode step of transformers takes on a GPU: what captured decode is held against.

A program of its own, which may be ended at any time: compiling takes most of a minute. Rows are lines of JSON on
stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.pytorch_times import CAPACITY, CONTEXT, block_us, spread
from benchmarks.gpu.random_torch_llama import SIZES

FORMS: Final = ("compiled", "eager")


def main(arguments: Sequence[str] | None = None) -> int:
    """The 8B's shape first, compiled: what the bar asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two layers")
    smoke = parser.parse_args(arguments).smoke
    for name in ("1B",) if smoke else ("8B", "1B"):
        config = {**SIZES[name], **({"num_hidden_layers": 2} if smoke else {})}
        for form in FORMS:
            row: dict[str, Any] = {"what": "transformers", "kind": "decode", "model": name, "form": form}
            try:
                row |= step_times(config, form, steps=8 if smoke else 32)
            except Exception as err:  # what one form cannot do costs the other ones nothing
                row |= {"passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
            print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()
    return 0


def step_times(config: dict[str, Any], form: str, *, steps: int, device: str = "cuda") -> dict[str, Any]:
    """Of a step behind the context, batch 1, bfloat16, a static cache.

    Args:
        config: Of a plain Llama.
        form: "eager", or "compiled": the call that `generate` itself compiles for a static cache on a GPU, in its
            default mode, "reduce-overhead", which replays CUDA graphs.
        steps: To time.
        device: Of everything.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: PLC0415 - heavy

    values = {key: value for key, value in config.items() if key not in {"model_type", "architectures"}}
    begin = time.monotonic()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**values, dtype=torch.bfloat16))
    torch.set_default_dtype(default)
    cast("nn.Module", model).eval()
    forward: Callable[..., Any] = model.forward
    if form == "compiled":
        forward = cast("Any", model).get_compiled_call(None)
    ids = torch.randint(0, config["vocab_size"], (1, CONTEXT), device=device)
    with torch.no_grad():  # as `generate` has it
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        token, place = ids[:, :1].clone(), torch.full((1, 1), CONTEXT, device=device)

        def step() -> None:
            forward(input_ids=token, position_ids=place, past_key_values=cache, logits_to_keep=1)
            place.add_(1)

        _block_ms(step, 4, device)
        warm_up = round(time.monotonic() - begin, 1)
        times = np.array([_block_ms(step, 4, device) for _ in range(steps // 4)])
    # The cache counts: had a step not advanced it, what was timed would be no decode.
    filled = int(cache.get_seq_length())
    if filled != CONTEXT + 4 + steps // 4 * 4:
        raise RuntimeError(f"{filled} tokens are in the cache, not {CONTEXT} and those of the steps")
    return {"batch": 1, "past": CONTEXT, "ms": spread(times), "warm_up_s": warm_up}


def _block_ms(step: Callable[[], object], runs: int, device: str) -> float:
    """Milliseconds of a step, over so many in a row."""
    if device != "cpu":
        return block_us(step, runs) * 1e-3
    begin = time.perf_counter()
    for _ in range(runs):
        step()
    return (time.perf_counter() - begin) / runs * 1e3


if __name__ == "__main__":
    sys.exit(main())
