"""What runners of graphs with a growing KV cache share, whatever runs the graph."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import numpy as np

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.decoder_interface import DecoderInterface
from dlo_export.runtimes.runner import Runner, StepRequest, StepResult, float32


class GrowingRunner(Runner):
    """A runner whose graph returns a longer cache with every step.

    Args:
        name: For reports.
        interface: Of the graph.
        thresholds: Of its routers, see `Runner`; the graph compares with them itself and does not show them.
        takes_padding: Whether sequences may be padded at their left.
    """

    def __init__(
        self,
        name: str,
        interface: DecoderInterface,
        *,
        thresholds: Mapping[int, float] | None = None,
        takes_padding: bool = True,
    ) -> None:
        super().__init__(
            name,
            num_layers=interface.num_layers,
            routed_layers=interface.routed_layers,
            thresholds=thresholds,
            forcing=interface.forcing,
            last_logits_only=interface.last_logits,
            takes_padding=takes_padding,
        )
        self._interface = interface

    @abc.abstractmethod
    def _run(self, feeds: Mapping[str, np.ndarray], request: StepRequest) -> Mapping[str, np.ndarray]:
        """Runs a step behind the cached tokens, and keeps the longer cache.

        Args:
            feeds: All inputs but the cache's.
            request: What they were made of.

        Returns:
            `interface.observed` of the request, in the graph's types.
        """

    def _compute(self, request: StepRequest) -> StepResult:
        outputs = self._run(self._feeds(request), request)
        logits = outputs[names.LOGITS]
        if request.last_logits and logits.shape[1] > 1:
            logits = logits[:, -1:].copy()  # a copy of one row, so that the rest can be freed
        hidden = self._interface.hidden_layers if request.hidden_states else ()
        return StepResult(
            float32(logits),
            {i: float32(outputs[names.router_scores_name(i)]) for i in self._interface.scored_layers},
            {i: float32(outputs[names.hidden_name(i)]) for i in hidden},
        )

    def _feeds(self, request: StepRequest) -> dict[str, np.ndarray]:
        """What is fed beside the cache: other exporters' graphs may do without mask or positions."""
        tokens = {
            names.INPUT_IDS: request.input_ids,
            names.ATTENTION_MASK: request.attention_mask,
            names.POSITION_IDS: request.position_ids,
        }
        feeds = {key: np.ascontiguousarray(tokens[key], np.int64) for key in self._interface.step_inputs}
        decisions = {
            names.force_active_name(layer): np.ascontiguousarray(active, np.bool_)
            for layer, active in (request.force_active or {}).items()
        }
        return {**feeds, **decisions}
