"""What runners of graphs with a static KV cache share, whatever runs the graph."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from dlo_export.checkpoints import interface as names
from dlo_export.checkpoints.errors import DloError
from dlo_export.runtimes.decoder_interface import DecoderInterface
from dlo_export.runtimes.errors import BackendUnavailableError
from dlo_export.runtimes.memory import in_words
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
        with self._telling_of_memory(batch):
            self._zero_slots(batch)

    @contextlib.contextmanager
    def _telling_of_memory(self, batch: int) -> Iterator[None]:
        """Says what a cache for so many sequences takes, where there is no room for it.

        Raises:
            BackendUnavailableError: In place of the block's, and of a MemoryError.
        """
        try:
            yield
        except (BackendUnavailableError, MemoryError) as err:
            needed = sum(self._interface.state_bytes(batch).values())
            reason = err.message if isinstance(err, DloError) else err
            raise BackendUnavailableError(
                f"{self.name}: a KV cache of {self.max_cache:,} slots for each of {batch} sequences takes "
                f"{in_words(needed)}, and {reason}",
                hint=f"run fewer sequences at once, or export with a smaller {self._tokens.limits.cache_option}",
            ) from err

    def _compute(self, request: StepRequest) -> StepResult:
        steps = self._tokens.next_steps(
            request.input_ids, request.attention_mask, request.position_ids, request.force_active
        )
        results = [self._result(step, request) for step in steps]
        self._tokens.append(steps)
        whole = results[0]
        for step, result in zip(steps[1:], results[1:], strict=True):
            _add(step, result, whole)
        return whole

    def _result(self, step: StaticCacheStep, request: StepRequest) -> StepResult:
        """Runs a step; 0 wherever it fed nothing."""
        outputs = self._run(step, request)
        logits = outputs[names.LOGITS]
        last = request.last_logits or logits.shape[1] != step.ragged
        hidden = self._interface.hidden_layers if request.hidden_states else ()
        return StepResult(
            step.last(logits) if last else step.restored(logits),
            {i: step.restored(outputs[names.router_scores_name(i)]) for i in self._interface.scored_layers},
            {i: step.restored(outputs[names.hidden_name(i)]) for i in hidden},
        )


def _add(step: StaticCacheStep, result: StepResult, whole: StepResult) -> None:
    """Puts what a later step has computed into the result of all: of last logits, those of the sequences it fed."""
    is_last = result.logits.shape[1] != step.real.shape[1]
    fed = (step.counts > 0)[:, np.newaxis] if is_last else step.real
    whole.logits[fed] = result.logits[fed]
    for layer, scores in result.router_scores.items():
        whole.router_scores[layer][step.real] = scores[step.real]
    for layer, states in result.hidden_states.items():
        whole.hidden_states[layer][step.real] = states[step.real]
