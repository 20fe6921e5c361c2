"""Where a training step stopped being numbers, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.sharding import whole


class MicroBatch(NamedTuple):
    """What a micro-batch was run with, and its language loss."""

    inputs: dict[str, torch.Tensor]
    routing: dict[str, Any]
    loss: torch.Tensor


@torch.no_grad()
def first_bad_layer(
    model: LlamaDloForCausalLM,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    autocast: Callable[[], AbstractContextManager[None]],
) -> str:
    """Runs the first bad micro-batch again; every process one, since a sharded model runs in all or in none.

    Args:
        model: As it is before the step.
        micro_batches: Of the step.
        accelerator: Of the run.
        autocast: Makes the context in which the model runs.
    """
    bad = [batch for batch in micro_batches if not batch.loss.isfinite()]
    batch = (bad or micro_batches)[0]
    values = {name: value for name, value in batch.inputs.items() if name != "labels"}
    with autocast():
        outputs = model(**values, **batch.routing, use_cache=False, output_hidden_states=True)
    streams = outputs.hidden_states
    is_bad = torch.stack([~stream.isfinite().all() for stream in streams] + [torch.ones_like(batch.loss).bool()])
    position = int(accelerator.gather(is_bad.int().argmax().reshape(1)).min())
    if position == 0:
        return "the embeddings are not"
    if position == len(streams):
        return "every layer's output is, the logits or a router's score are not"
    return f"layer {position - 1} is the first whose output is not"


def first_bad_gradient(model: LlamaDloForCausalLM) -> str:
    """Asks all weights, which may lie in shards."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not whole(parameter.grad.isfinite().all()):
            return f"{name} is the first whose gradient is not"
    return "its norm overflows"
