"""What a static-cache graph computed, as `Runner.step` returns it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.runner import StepResult
from dlo_export.runtimes.static_cache.batches import StaticCacheStep
from dlo_export.runtimes.static_cache.interface import StaticCacheInterface


def check_logits(name: str, interface: StaticCacheInterface, sequence: int, last_logits: bool) -> None:
    """Checks that a graph has the logits a step asks for.

    Args:
        name: Of the runner.
        interface: Of the graph.
        sequence: Tokens of the step.
        last_logits: As `Runner.step`.

    Raises:
        StepError: It keeps the last token's, and all are asked for.
    """
    if interface.last_logits and not last_logits and sequence > 1:
        raise StepError(
            f"{name}: computes the last token's logits only, and those of all {sequence} tokens were asked for",
            hint="ask for last_logits, or export without --trt-last-logits",
        )


def step_result(
    interface: StaticCacheInterface,
    step: StaticCacheStep,
    outputs: Mapping[str, np.ndarray],
    *,
    last_logits: bool,
    hidden_states: bool,
) -> StepResult:
    """What a step computed, where `Runner.step` expects it.

    Args:
        interface: Of the graph.
        step: What was fed.
        outputs: float32 by name; `logits`, `router_scores.{l}` and `hidden.{l}` as the graph gave them.
        last_logits: As `Runner.step`.
        hidden_states: As `Runner.step`.
    """
    logits = outputs["logits"]
    last = last_logits or logits.shape[1] != step.ragged
    return StepResult(
        step.last(logits) if last else step.restored(logits),
        {layer: step.restored(outputs[f"router_scores.{layer}"]) for layer in interface.scored_layers},
        {
            layer: step.restored(outputs[f"hidden.{layer}"])
            for layer in (interface.hidden_layers if hidden_states else ())
        },
    )
