"""Runs a decoder graph in ONNX Runtime; the KV cache stays where ONNX Runtime writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import numpy as np

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.onnxruntime.growing_cache import GrowingCache
from dlo_export.runtimes.onnxruntime.session import DecoderSession, SessionArguments, float32, model_name
from dlo_export.runtimes.runner import Runner, StepRequest, StepResult


class OnnxRuntimeRunner(Runner):
    """Of any graph with the documented interface: ours, optimum's, onnxruntime-genai's of standard operators.

    What a step outputs as `present` is bound as the next step's `past` where it lies.

    Args:
        model: A .onnx file, or a serialized model.
        name: For reports; the file's name by default.
        session: How it runs; `SessionArguments` lists the choices.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here, or the provider is not available.
        ModelInterfaceError: It is not a decoder with a KV cache.
    """

    def __init__(
        self, model: str | Path | bytes, *, name: str | None = None, **session: Unpack[SessionArguments]
    ) -> None:
        name = name or model_name(model)
        self._session = DecoderSession(model, name, "growing", session)
        self._interface = self._session.interface
        self._cache: GrowingCache | None = None
        super().__init__(
            name,
            num_layers=self._interface.num_layers,
            routed_layers=self._interface.routed_layers,
            forcing=self._interface.forcing,
        )

    def _empty_cache(self, batch: int) -> None:
        shapes = self._interface.state_shapes(batch)
        states = {key: (shape, self._session.state_type(key)) for key, shape in shapes.items()}
        self._cache = GrowingCache(states, self._interface.present_of)

    def _compute(self, request: StepRequest) -> StepResult:
        assert self._cache is not None, "a step comes after a reset"
        binding = self._session.binding()
        for key, array in self._feeds(request).items():
            binding.bind_cpu_input(key, array)
        observed = self._interface.observed(hidden_states=request.hidden_states)
        for key in observed:
            binding.bind_output(key, "cpu")
        self._cache.bind(binding, request.sequence)
        self._session.run(binding)
        self._cache.advance()
        # Outputs come in the order they were bound, the cache's behind the observed ones.
        outputs = dict(zip(observed, binding.get_outputs(), strict=False))
        logits = outputs[names.LOGITS].numpy()
        if request.last_logits and logits.shape[1] > 1:
            logits = logits[:, -1:].copy()  # a copy of one row, so that the rest can be freed
        hidden = self._interface.hidden_layers if request.hidden_states else ()
        return StepResult(
            float32(logits),
            {i: float32(outputs[names.router_scores_name(i)].numpy()) for i in self._interface.scored_layers},
            {i: float32(outputs[names.hidden_name(i)].numpy()) for i in hidden},
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

    def _free(self) -> None:
        self._cache = None
        del self._session
