"""Runs a decoder graph in ONNX Runtime; the KV cache stays where ONNX Runtime writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import numpy as np

from dlo_export.runtimes.growing_runner import GrowingRunner
from dlo_export.runtimes.onnxruntime.growing_cache import GrowingCache
from dlo_export.runtimes.onnxruntime.session import DecoderSession, SessionArguments, model_name
from dlo_export.runtimes.runner import StepRequest


class OnnxRuntimeRunner(GrowingRunner):
    """Of any graph with the documented interface: ours, optimum's, onnxruntime-genai's of standard operators.

    What a step outputs as `present` is bound as the next step's `past` where it lies.

    Args:
        model: A .onnx file, or a serialized model.
        name: For reports; the file's name by default.
        thresholds: Of its routers, see `Runner`.
        session: How it runs; `SessionArguments` lists the choices.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here.
        BackendUnavailableError: The provider is not there, does not start, or has no memory left.
        ModelInterfaceError: It is not a decoder with a KV cache.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        name: str | None = None,
        thresholds: Mapping[int, float] | None = None,
        **session: Unpack[SessionArguments],
    ) -> None:
        name = name or model_name(model)
        self._session = DecoderSession(model, name, "growing", session)
        self._cache: GrowingCache | None = None
        self._outputs = self._session.step_outputs()
        takes_padding = self._session.takes_padding
        super().__init__(name, self._session.interface, thresholds=thresholds, takes_padding=takes_padding)

    def _empty_cache(self, batch: int) -> None:
        shapes = self._interface.state_shapes(batch)
        states = {key: (shape, self._interface.element_type(key)) for key, shape in shapes.items()}
        self._cache = GrowingCache(states, self._interface.present_of, self._session.memory)

    def _repeat_cache(self, branches: int) -> None:
        assert self._cache is not None, "a fork comes after a reset"
        self._interface.state_shapes(branches)  # refuses a graph of a fixed batch
        self._cache.repeat(branches)

    def _run(self, feeds: Mapping[str, np.ndarray], request: StepRequest) -> Mapping[str, np.ndarray]:
        assert self._cache is not None, "a step comes after a reset"
        binding = self._session.binding()
        for key, array in feeds.items():
            binding.bind_cpu_input(key, array)
        self._outputs.bind(binding, request)
        self._cache.bind(binding, request.sequence)
        self._session.run(binding)
        outputs = binding.get_outputs()  # once: it makes an object of every one of them
        self._cache.advance(outputs)
        return self._outputs.read(request, lambda: outputs)

    def _free(self) -> None:
        self._cache = None
        del self._outputs
        del self._session
