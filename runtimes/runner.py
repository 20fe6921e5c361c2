"""The one protocol behind which every runtime executes a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from dlo_export.runtimes.errors import StepError

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
# By routed layer, bool [batch, sequence]: whose MLP runs.
Decisions = Mapping[int, BoolArray]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step computes, for the tokens of that step.

    Attributes:
        logits: float32 [batch, sequence, vocab], or [batch, 1, vocab] where only the last token's were asked for.
        router_scores: By routed layer, float32 [batch, sequence]; empty where the model does not expose them.
        hidden_states: By layer, the residual stream behind it, float32 [batch, sequence, hidden]; empty where not
            asked for or not exposed.
    """

    logits: FloatArray
    router_scores: Mapping[int, FloatArray]
    hidden_states: Mapping[int, FloatArray]


class Runner(Protocol):
    """A decoder with its KV cache, which lives inside the runner from one `reset` to the next.

    A context manager: leaving it frees the model.

    Attributes:
        name: For reports.
        num_layers: Decoder layers.
        routed_layers: Layers whose routing the model exposes, ascending. A released graph hides its routers.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def num_layers(self) -> int: ...  # noqa: D102

    @property
    def routed_layers(self) -> tuple[int, ...]: ...  # noqa: D102

    def reset(self, batch: int) -> None:
        """Empties the cache, for sequences of a new batch."""
        ...

    def step(
        self,
        input_ids: Int64Array,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        *,
        force_active: Decisions | None = None,
        last_logits: bool = False,
        hidden_states: bool = False,
    ) -> StepResult:
        """Feeds the next tokens of every sequence and appends them to the cache.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, past + sequence], 0 at padding.
            position_ids: int64 [batch, sequence].
            force_active: Decisions in place of the routers', for every routed layer: bool [batch, sequence].
            last_logits: Return the last token's logits only.
            hidden_states: Return the residual stream behind every layer, if the model exposes it.

        Raises:
            StepError: Shapes contradict each other or the cache; decisions are missing, or for layers without router.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_step(
    runner: Runner,
    batch: int | None,
    past: int,
    input_ids: Int64Array,
    attention_mask: Int64Array,
    position_ids: Int64Array,
    force_active: Decisions | None,
) -> None:
    """Checks a step's arguments, all of them at once.

    Args:
        runner: Which is asked.
        batch: Of the last `reset`; None before the first.
        past: Tokens in the cache.
        input_ids: As `Runner.step`.
        attention_mask: As `Runner.step`.
        position_ids: As `Runner.step`.
        force_active: As `Runner.step`.

    Raises:
        StepError: As `Runner.step`.
    """
    if batch is None:
        raise StepError(f"{runner.name}: step before reset", hint="call reset(batch) before the first step")
    problems = []
    if input_ids.ndim != 2 or input_ids.shape[0] != batch or input_ids.shape[1] == 0:
        problems.append(f"input_ids has shape {list(input_ids.shape)}, expected [{batch}, sequence >= 1]")
    else:
        sequence = input_ids.shape[1]
        expected = {"attention_mask": (batch, past + sequence), "position_ids": (batch, sequence)}
        found = {"attention_mask": attention_mask.shape, "position_ids": position_ids.shape}
        for layer in sorted(force_active or {}):
            expected[f"force_active[{layer}]"] = (batch, sequence)
            found[f"force_active[{layer}]"] = (force_active or {})[layer].shape
        problems += [
            f"{name} has shape {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if found[name] != shape
        ]
    if force_active is not None and tuple(sorted(force_active)) != runner.routed_layers:
        problems.append(f"force_active is for layers {sorted(force_active)}, expected {list(runner.routed_layers)}")
    if problems:
        raise StepError(f"{runner.name}: {'; '.join(problems)}")


def check_forcing(name: str, forced_layers: tuple[int, ...], force_active: Decisions | None) -> None:
    """Checks that decisions come if, and only if, a graph takes them.

    Args:
        name: Of the runner, for messages.
        forced_layers: With a `force_active.{l}` input.
        force_active: As `Runner.step`.

    Raises:
        StepError: They do not.
    """
    if force_active is None and forced_layers:
        raise StepError(
            f"{name}: takes its decisions from force_active.{{layer}} inputs and got none, expected layers "
            f"{list(forced_layers)}",
            hint="give force_active to every step, or run a graph whose routers decide",
        )
    if force_active and not forced_layers:
        raise StepError(
            f"{name}: has no force_active.{{layer}} inputs, so decisions cannot be given to it",
            hint="run a parity build of the graph",
        )
