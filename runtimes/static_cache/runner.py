"""What runners of graphs with a static KV cache share, whatever runs the graph."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import numpy as np

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.decoder_interface import DecoderInterface
from dlo_export.runtimes.runner import Runner, StepRequest, StepResult
from dlo_export.runtimes.static_cache.batches import StaticCache, StaticCacheLimits, StaticCacheStep


class StaticRunner(Runner):
    """A runner whose cache has a fixed number of slots; what is computed for padding comes back as 0.

    Beside what every runner refuses, a step must fit into the cache and the limits.

    Args:
        name: For reports.
        interface: Of the graph or engine.
        max_batch: Refuse larger batches, as an engine's profiles do; None takes any.
        max_sequence: Refuse longer steps, likewise.
        thresholds: Of its routers, see `Runner`; the graph compares with them itself and does not show them.
    """

    def __init__(
        self,
        name: str,
        interface: DecoderInterface,
        *,
        max_batch: int | None = None,
        max_sequence: int | None = None,
        thresholds: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(
            name,
            num_layers=interface.num_layers,
            routed_layers=interface.routed_layers,
            forcing=interface.forcing,
            last_logits_only=interface.last_logits,
            thresholds=thresholds,
            max_step=max_sequence,
        )
        self._interface = interface
        limits = StaticCacheLimits(interface.max_cache, max_batch, max_sequence)
        if interface.cache == "in_place":
            limits = dataclasses.replace(limits, cache_option="--static-cache")
        self._tokens = StaticCache(name, limits)

    @property
    def max_cache(self) -> int:
        """Slots for tokens in the cache, per sequence."""
        return self._interface.max_cache

    @abc.abstractmethod
    def _zero_slots(self, batch: int) -> None:
        """Zeroes the cache: masked slots must still be numbers."""

    @abc.abstractmethod
    def _run(self, step: StaticCacheStep, request: StepRequest) -> Mapping[str, np.ndarray]:
        """Runs a step on the cache, in place.

        Args:
            step: What to feed.
            request: What it was made of.

        Returns:
            `interface.observed` of the request, float32.
        """

    def _empty_cache(self, batch: int) -> None:
        self._tokens.reset(batch)
        self._zero_slots(batch)

    def _compute(self, request: StepRequest) -> StepResult:
        step = self._tokens.next_step(
            request.input_ids, request.attention_mask, request.position_ids, request.force_active
        )
        outputs = self._run(step, request)
        self._tokens.append(step)
        logits = outputs[names.LOGITS]
        last = request.last_logits or logits.shape[1] != step.ragged
        hidden = self._interface.hidden_layers if request.hidden_states else ()
        return StepResult(
            step.last(logits) if last else step.restored(logits),
            {i: step.restored(outputs[names.router_scores_name(i)]) for i in self._interface.scored_layers},
            {i: step.restored(outputs[names.hidden_name(i)]) for i in hidden},
        )
