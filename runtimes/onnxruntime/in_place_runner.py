"""Runs a decoder whose KV cache ONNX Runtime writes in place; on a GPU its decode step is a captured CUDA graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints.interface import (
    INPUT_IDS,
    KV_LENGTHS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    force_active_name,
)
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory
from dlo_export.runtimes.onnxruntime.providers import CPU
from dlo_export.runtimes.onnxruntime.session import DecoderSession, SessionArguments, model_name
from dlo_export.runtimes.onnxruntime.step_outputs import StepOutputs
from dlo_export.runtimes.runner import StepRequest, float32
from dlo_export.runtimes.static_cache.batches import StaticCacheStep
from dlo_export.runtimes.static_cache.runner import StaticRunner


class InPlaceRunner(StaticRunner):
    """Of a graph that `exporter.target_graphs.build_captured_model` makes.

    A step of one token per sequence is bound once for a batch: on a GPU ONNX Runtime captures it and replays it from
    then on. Longer steps run sequence by sequence, as the graph's attention takes them.

    Args:
        model: A .onnx file, or a serialized model.
        name: For reports; the file's name by default.
        thresholds: Of its routers, see `Runner`.
        session: How it runs; `SessionArguments` lists the choices.

    Raises:
        ModelLoadError: The model is missing, damaged or cannot run here.
        BackendUnavailableError: The provider is not there, does not start, or has no memory left.
        ModelInterfaceError: It is no decoder with such a cache.
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
        provider = session.get("provider", CPU)
        if provider.device != CPU.device:
            session["provider"] = provider.with_cuda_graph()
        self._session = DecoderSession(model, name, "in_place", session)
        self._cache: dict[str, DeviceMemory] = {}
        self._decode: _BoundStep | None = None
        self._graphs = 0
        super().__init__(name, self._session.interface, thresholds=thresholds)

    def _zero_slots(self, batch: int) -> None:
        # On a GPU attention multiplies by 0 what nobody has filled, so it must be numbers: zeros, or earlier tokens.
        shapes = self._interface.state_shapes(batch)
        if self._decode is not None and self._decode.batch == batch:
            return
        self._decode = None
        self._cache = self._cache or {key: self._session.memory() for key in shapes}
        if all(self._cache[key].bytes >= size for key, size in self._interface.state_bytes(batch).items()):
            return
        self._session.check_room(batch)
        for key, memory in self._cache.items():
            memory.write(np.zeros(shapes[key], self._interface.element_type(key).numpy))

    def _repeat_cache(self, branches: int) -> None:
        shapes = self._interface.state_shapes(1)
        self._interface.state_shapes(branches)  # refuses a graph of a fixed batch
        with self._telling_of_memory(branches):
            self._session.check_room(branches)
            self._decode = None  # bound to where the cache lies now
            for key, memory in self._cache.items():
                memory.write(np.repeat(memory.read(self._interface.element_type(key), shapes[key]), branches, 0))
        self._tokens.repeat(branches)

    def _run(self, step: StaticCacheStep, request: StepRequest) -> Mapping[str, np.ndarray]:
        self._check_positions(step)
        if step.ragged == 1 and not request.hidden_states:
            return self._run_decode(step, request)
        # Each sequence by itself and without padding; what nobody reads, of padding, stays 0. Where the last token's
        # logits are asked for, the others, megabytes of a long prompt, stay where they were computed.
        joined: dict[str, np.ndarray] = {}
        for row, count in enumerate(step.counts):
            if not count:
                continue
            feeds = {name: value[row : row + 1, :count] for name, value in self._feeds(step).items() if value.ndim > 1}
            feeds[KV_LENGTHS] = step.feeds[KV_LENGTHS][row : row + 1]
            bound = _BoundStep(self._session, self._cache, feeds, request, row)
            for name, value in bound.run(feeds, None).items():
                last = name == LOGITS and (request.last_logits or self._interface.last_logits)
                shape = (step.batch, 1 if last else step.ragged, *value.shape[2:])
                joined.setdefault(name, np.zeros(shape, np.float32))[row, : 1 if last else count] = value[0]
        return joined

    def _run_decode(self, step: StaticCacheStep, request: StepRequest) -> Mapping[str, np.ndarray]:
        # A sequence that has ended writes too, behind its last token, where nobody looks.
        feeds = {**self._feeds(step), KV_LENGTHS: step.feeds[WRITE_INDICES] + 1}
        if self._decode is None:
            self._decode = _BoundStep(self._session, self._cache, feeds, request, 0)
            self._graphs += 1
        return self._decode.run(feeds, self._graphs)

    def _feeds(self, step: StaticCacheStep) -> dict[str, np.ndarray]:
        """What the graph takes of a step."""
        forced = [force_active_name(layer) for layer in self._interface.forced_layers]
        return {name: step.feeds[name] for name in (INPUT_IDS, *forced)}

    def _check_positions(self, step: StaticCacheStep) -> None:
        """The graph counts positions itself.

        Raises:
            StepError: Others were asked for.
        """
        columns = np.arange(step.ragged)
        expected = step.feeds[WRITE_INDICES][:, np.newaxis] + columns
        real = columns < step.counts[:, np.newaxis]
        if (step.feeds[POSITION_IDS] != expected)[real].any():
            raise StepError(
                f"{self.name}: position_ids are not those of each sequence's tokens, counted from 0",
                hint="leave them out, or run the model with a cache that grows",
            )

    def _free(self) -> None:
        self._decode = None
        self._cache = {}
        del self._session


class _BoundStep:
    """A step with everything it reads and writes bound: the rows of a batch from `first` on.

    Args:
        session: Open.
        cache: Of all rows, by the names of inputs.
        feeds: What it is fed first; later feeds have the same shapes.
        request: What it is asked for first.
        first: Row of the cache.
    """

    def __init__(
        self,
        session: DecoderSession,
        cache: Mapping[str, DeviceMemory],
        feeds: Mapping[str, np.ndarray],
        request: StepRequest,
        first: int,
    ) -> None:
        self.batch = len(feeds[KV_LENGTHS])
        self._session = session
        self._binding: ort.IOBinding = session.binding()
        self._request = dataclasses.replace(request, input_ids=feeds[INPUT_IDS])
        # Memory of its own: an address that a graph has captured is nobody else's.
        self._outputs = StepOutputs(session.interface, session.memory)
        self._outputs.bind(self._binding, self._request)
        self._inputs = {name: session.memory() for name in feeds}
        for name, memory in self._inputs.items():
            memory.overwrite(feeds[name])
            memory.bind_input(self._binding, name, session.interface.element_type(name), feeds[name].shape)
        for name, shape in session.interface.state_shapes(self.batch).items():
            kind, start = session.interface.element_type(name), first * math.prod(shape[1:])
            cache[name].bind_input(self._binding, name, kind, shape, start)
            cache[name].bind_output(self._binding, session.interface.present_of[name], kind, shape, start)

    def run(self, feeds: Mapping[str, np.ndarray], graph: int | None) -> dict[str, np.ndarray]:
        """Runs it, captured as the graph of this number or not at all; float32 by the names of outputs."""
        for name, memory in self._inputs.items():
            memory.overwrite(feeds[name])
        self._session.run(self._binding, graph)
        found = self._outputs.read(self._request, self._binding.get_outputs)
        return {name: float32(value) for name, value in found.items()}
