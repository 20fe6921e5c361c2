"""A model seen as one of fewer layers, where those left out change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dlo_export.runtimes.runner import Decisions, Runner, StepRequest, StepResult


class FewerLayersRunner(Runner):
    """Runs a model with all its layers, and numbers them without those that a candidate does not have.

    Args:
        whole: The model; closed with this runner.
        kept: Indices of the layers that the candidate has, ascending.
    """

    def __init__(self, whole: Runner, kept: Sequence[int]) -> None:
        self._whole = whole
        self._old = tuple(kept)
        self._new = {old: new for new, old in enumerate(kept)}
        super().__init__(
            whole.name,
            num_layers=len(kept),
            routed_layers=tuple(new for old, new in self._new.items() if old in whole.routed_layers),
            thresholds={self._new[old]: value for old, value in whole.thresholds.items() if old in self._new},
            last_logits_only=whole.last_logits_only,
        )

    def _empty_cache(self, batch: int) -> None:
        self._whole.reset(batch)

    def _repeat_cache(self, branches: int) -> None:
        self._whole.fork(branches)

    def _compute(self, request: StepRequest) -> StepResult:
        result = dataclasses.replace(request, force_active=self._all_decisions(request)).pass_on(self._whole)
        return StepResult(
            result.logits,
            {self._new[old]: scores for old, scores in result.router_scores.items() if old in self._new},
            {self._new[old]: stream for old, stream in result.hidden_states.items() if old in self._new},
        )

    def _all_decisions(self, request: StepRequest) -> Decisions | None:
        """The candidate's decisions, and any at all for layers that change nothing either way."""
        given = request.force_active
        if not given:
            return None
        anything = next(iter(given.values()))
        return {old: given[self._new[old]] if old in self._new else anything for old in self._whole.routed_layers}

    def _free(self) -> None:
        self._whole.close()
