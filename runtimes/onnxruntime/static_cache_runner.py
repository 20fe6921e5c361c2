"""Runs a TensorRT graph with a static KV cache in ONNX Runtime: what an engine computes, on a machine without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import numpy as np

from dlo_export.checkpoints.interface import INPUT_IDS
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory
from dlo_export.runtimes.onnxruntime.session import DecoderSession, SessionArguments, model_name
from dlo_export.runtimes.runner import StepRequest, float32
from dlo_export.runtimes.static_cache.batches import StaticCacheStep
from dlo_export.runtimes.static_cache.runner import StaticRunner


class StaticCacheRunner(StaticRunner):
    """Of the graph that a TensorRT engine is built from.

    ONNX Runtime's CPU provider runs float32 graphs (and float16 ones where it has the kernels): export the fp32 twin.

    Args:
        model: A .onnx file, or a serialized model.
        name: For reports; the file's name by default.
        max_batch: Refuse larger batches, as the engine's profiles would; None takes any.
        max_sequence: Refuse longer steps, likewise.
        session: How it runs; `SessionArguments` lists the choices.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here.
        BackendUnavailableError: The provider is not there, does not start, or has no memory left.
        ModelInterfaceError: It is no decoder with a static cache.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        name: str | None = None,
        max_batch: int | None = None,
        max_sequence: int | None = None,
        **session: Unpack[SessionArguments],
    ) -> None:
        name = name or model_name(model)
        self._session = DecoderSession(model, name, "static", session)
        self._cache: dict[str, DeviceMemory] = {}
        self._outputs = self._session.step_outputs()
        super().__init__(name, self._session.interface, max_batch=max_batch, max_sequence=max_sequence)

    def _zero_slots(self, batch: int) -> None:
        self._shapes = self._interface.state_shapes(batch)
        self._cache = {}  # what they hold goes first
        self._session.check_room(batch)
        self._cache = {key: self._session.memory() for key in self._shapes}
        for key, memory in self._cache.items():
            memory.write(np.zeros(self._shapes[key], self._interface.element_type(key).numpy))

    def _run(self, step: StaticCacheStep, request: StepRequest) -> Mapping[str, np.ndarray]:
        binding = self._session.binding()
        for key, array in step.feeds.items():
            binding.bind_cpu_input(key, np.ascontiguousarray(array))
        # Outputs have the shapes of what is fed. A sequence's last logits need not stand in the last column.
        fed = dataclasses.replace(request, input_ids=step.feeds[INPUT_IDS], last_logits=False)
        self._outputs.bind(binding, fed)
        for key, memory in self._cache.items():
            kind, shape = self._interface.element_type(key), self._shapes[key]
            memory.bind_input(binding, key, kind, shape)
            # TensorScatter sees that both are one buffer, and copies nothing.
            memory.bind_output(binding, self._interface.present_of[key], kind, shape)
        self._session.run(binding)
        return {key: float32(value) for key, value in self._outputs.read(fed, binding.get_outputs).items()}

    def _free(self) -> None:
        self._cache = {}
        del self._outputs
        del self._session
