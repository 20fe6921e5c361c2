"""What gpu_check looks at: one model, as its artefact's ONNX graph and as engines, each opened when its turn comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from dlo_export.runtimes.parity.compare import OpenRunner
from dlo_export.runtimes.runner import Decisions, Int64Array, Runner, StepResult
from dlo_export.runtimes.static_cache.batches import StaticCacheLimits

Phase = str
"""``prefill`` or ``decode``."""
LayerSeconds = Mapping[str, float]
"""Duration of one step's layers, by the name the runtime gives them."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One artefact.

    Attributes:
        name: For the report.
        lowering: What routed layers became; "none" where nothing is routed.
        dtype: Of the engines, a key of dlo_export.runtimes.parity.tolerances.TOLERANCES.
        vocab_size: To draw tokens from.
        limits: What the engines take.
        open_reference: What is right: scores and forced decisions, float32.
        open_free: The engines as released.
        open_forced: Engines that take decisions; None where nothing is routed.
        layer_seconds: Times every layer of the forced engines: called with the phase and the share of active tokens
            (1 or 0), returns one step's medians. None where nothing is routed.
        last_logits: Whether the engines keep the last token's logits only.
        mlp_share: Of the routed MLPs, in the weights a decode step reads.
    """

    name: str
    lowering: str
    dtype: str
    vocab_size: int
    limits: StaticCacheLimits
    open_reference: OpenRunner
    open_free: OpenRunner
    open_forced: OpenRunner | None = None
    layer_seconds: Callable[[Phase, float], LayerSeconds] | None = None
    last_logits: bool = False
    mlp_share: float = 0.0


class RoutedReference:
    """A `Runner` of two builds of one graph: one decides itself and shows its scores, the other obeys.

    Args:
        free: With scores.
        forced: With scores and decisions.
    """

    def __init__(self, free: Runner, forced: Runner) -> None:
        self._free, self._forced = free, forced

    @property
    def name(self) -> str:
        """See `Runner`."""
        return self._free.name

    @property
    def num_layers(self) -> int:
        """See `Runner`."""
        return self._free.num_layers

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """See `Runner`."""
        return self._free.routed_layers

    def reset(self, batch: int) -> None:
        """See `Runner`; decides until the next one whether decisions are given."""
        self._free.reset(batch)
        self._forced.reset(batch)

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
        """See `Runner`; all steps of one batch get decisions, or none does."""
        runner = self._free if force_active is None else self._forced
        return runner.step(
            input_ids,
            attention_mask,
            position_ids,
            force_active=force_active,
            last_logits=last_logits,
            hidden_states=hidden_states,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.__exit__(kind, error, trace)
        self._forced.__exit__(kind, error, trace)
