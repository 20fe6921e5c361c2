"""What gpu_check looks at: one model, as its artefact's ONNX graph and as engines, each opened when its turn comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dlo_export.runtimes.parity.compare import OpenRunner
from dlo_export.runtimes.runner import Runner, StepRequest, StepResult
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


class RoutedReference(Runner):
    """Of two builds of one graph: one decides itself and shows its scores, the other obeys.

    All steps of one batch get decisions, or none does.

    Args:
        free: With scores.
        forced: With scores and decisions.
    """

    def __init__(self, free: Runner, forced: Runner) -> None:
        super().__init__(free.name, num_layers=free.num_layers, routed_layers=free.routed_layers)
        self._free_runner, self._forced_runner = free, forced

    def _empty_cache(self, batch: int) -> None:
        self._free_runner.reset(batch)
        self._forced_runner.reset(batch)

    def _compute(self, request: StepRequest) -> StepResult:
        runner = self._free_runner if request.force_active is None else self._forced_runner
        return request.pass_on(runner)

    def _free(self) -> None:
        self._free_runner.close()
        self._forced_runner.close()
