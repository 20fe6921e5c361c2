"""Engines with their contexts and buffers: enqueues one step, from a captured graph where that is possible.

Everything here needs a GPU and has not been run on one yet.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlo_export.checkpoints.dtypes import BY_ONNX
from dlo_export.checkpoints.interface import INPUT_IDS
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.errors import StepError
from dlo_export.runtimes.tensorrt.device import CudaError, Device
from dlo_export.runtimes.tensorrt.engine_runtime import EngineRuntime
from dlo_export.runtimes.tensorrt.shapes import ProfileChoice, choose_profile, plan_buffers, profiles_of, step_shape

# One step runs before the capture: kernels load, and TensorRT allocates, when a shape is first enqueued.
_WARM_UP_STEPS = 1
_STEP_HINT = "dlo_artifact.json says what each engine was built for; build it again where that is not this GPU"
_Key = tuple[int, int]  # a context: engine, profile


class Execution:
    """Runs steps of one model.

    Args:
        runtime: Which reads them.
        device: Where.
        engines: Of one model; they share the cache.
        capture: Capture decode steps where the lowering allows it.
        layer_seconds: Gets every layer's durations by name, if not None; steps are slower and never captured.

    Raises:
        ModelLoadError: An engine cannot be loaded.
        CudaError: There is not enough memory.
    """

    def __init__(
        self,
        runtime: EngineRuntime,
        device: Device,
        engines: Sequence[EngineRecord],
        *,
        capture: bool,
        layer_seconds: dict[str, list[float]] | None,
    ) -> None:
        self._device = device
        self._runtime = runtime
        self._interface = engines[0].static_cache
        self._engines = [runtime.deserialize(engine) for engine in engines]
        self.cuda_graph = reason_not_to_capture(engines, capture, layer_seconds is not None) or "not captured yet"
        self._capture = self.cuda_graph == "not captured yet"
        self._profiler = None if layer_seconds is None else _profiler(runtime.module, layer_seconds)
        plan = plan_buffers(
            self._interface, max(engine.max_batch for engine in engines), max(engine.max_sequence for engine in engines)
        )
        self._addresses = {name: device.allocate(buffer.bytes) for name, buffer in plan.items() if not buffer.alias_of}
        self._addresses |= {name: self._addresses[b.alias_of] for name, b in plan.items() if b.alias_of is not None}
        self._cache_bytes = {past: plan[past].bytes for past in self._interface.present_of}
        self._contexts = {(c.engine, c.index): self._context(c) for c in profiles_of(engines)}
        # By context: the shape it is set to, how many steps it ran in that shape, and what was captured of them.
        self._shapes: dict[_Key, tuple[int, int]] = {}
        self._steps: dict[_Key, int] = {}
        self._graphs: dict[_Key, Any] = {}

    def reset(self) -> None:
        """Zeroes the cache: masked slots must still be numbers."""
        for past, size in self._cache_bytes.items():
            self._device.zero(self._addresses[past], size)

    def run(self, choice: ProfileChoice, feeds: Mapping[str, np.ndarray]) -> None:
        """Queues one step.

        Args:
            choice: Profile to run it in.
            feeds: By input, the cache left out.

        Raises:
            StepError: TensorRT refuses it.
            CudaError: The device failed.
        """
        for name, array in feeds.items():
            self._device.upload(array, self._addresses[name])
        batch, sequence = feeds[INPUT_IDS].shape
        key = (choice.engine, choice.index)
        self._set_shape(key, batch, sequence)
        if self._capture and sequence == 1 and key not in self._graphs and self._steps[key] >= _WARM_UP_STEPS:
            self._try_capture(key)
        if key in self._graphs:
            self._device.launch(self._graphs[key])
        else:
            self._enqueue(self._contexts[key])
        self._steps[key] += 1

    def fetch(self, name: str, batch: int, sequence: int, rows: Sequence[int] | None = None) -> np.ndarray:
        """Waits for an output of the last step.

        Args:
            name: Of the output.
            batch: Sequences of the step.
            sequence: Tokens of the step.
            rows: One token of each sequence to fetch in place of all.

        Returns:
            float32, [batch, sequence, …] or [batch, 1, …].
        """
        spec = self._interface.outputs[name]
        shape = step_shape(spec, batch, sequence)
        chosen = rows is not None and shape[1] > 1
        array = np.empty((shape[0], 1, *shape[2:]) if chosen else shape, BY_ONNX[spec.dtype].numpy)
        if chosen and rows is not None:
            size = math.prod(shape[2:]) * array.itemsize
            for index, row in enumerate(rows):
                self._device.download(self._addresses[name] + (index * shape[1] + row) * size, array[index])
        else:
            self._device.download(self._addresses[name], array)
        self._device.synchronize()
        return array.astype(np.float32, copy=False)

    def close(self) -> None:
        """Frees contexts, then engines, then memory."""
        for key in [*self._graphs]:
            self._drop_graph(key)
        self._contexts.clear()
        self._engines.clear()
        self._device.close()

    def _context(self, choice: ProfileChoice) -> Any:
        context = self._runtime.context(
            self._engines[choice.engine], eager_kernels=self._capture and choice.largest[1] == 1
        )
        if not context.set_optimization_profile_async(choice.index, self._device.stream):
            raise StepError(
                f"TensorRT refuses profile {choice.profile.name}{self._runtime.explanation()}", hint=_STEP_HINT
            )
        self._device.synchronize()
        if self._profiler is not None:
            context.profiler = self._profiler
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise StepError(f"TensorRT refuses memory for {name}{self._runtime.explanation()}", hint=_STEP_HINT)
        return context

    def _set_shape(self, key: _Key, batch: int, sequence: int) -> None:
        if self._shapes.get(key) == (batch, sequence):
            return
        self._drop_graph(key)  # it was captured in another shape
        self._shapes.pop(key, None)  # of none, where one input's is refused
        for name, spec in self._interface.inputs.items():
            shape = step_shape(spec, batch, sequence)
            if not self._contexts[key].set_input_shape(name, shape):
                raise StepError(
                    f"TensorRT refuses {name} of shape {list(shape)}{self._runtime.explanation()}", hint=_STEP_HINT
                )
        self._shapes[key], self._steps[key] = (batch, sequence), 0

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._device.stream):
            raise StepError(f"TensorRT failed to run a step{self._runtime.explanation()}", hint=_STEP_HINT)

    def _try_capture(self, key: _Key) -> None:
        """Captures the step; where that fails, says so once and goes on without."""
        context = self._contexts[key]
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._device.stream):
            self._give_up_capturing("TensorRT-RTX says that this engine's stream is not capturable")
            return
        try:
            self._graphs[key] = self._device.capture(lambda: self._enqueue(context))
        except (CudaError, StepError) as err:
            self._give_up_capturing(err.message)
            return
        self.cuda_graph = "captured"

    def _give_up_capturing(self, reason: str) -> None:
        self._capture = False
        self.cuda_graph = f"capture failed: {reason}"
        warnings.warn(f"TensorRT: decode runs without a CUDA graph, {self.cuda_graph}", RuntimeWarning, stacklevel=2)

    def _drop_graph(self, key: _Key) -> None:
        if key in self._graphs:
            self._device.synchronize()
            self._device.destroy(self._graphs.pop(key))


def reason_not_to_capture(engines: Sequence[EngineRecord], capture: bool, profiled: bool) -> str | None:
    """Why decode steps will not be captured; None where it is worth trying.

    Args:
        engines: Of the model.
        capture: Whether it is wanted.
        profiled: Whether layers are timed.
    """
    if not capture:
        return "not captured: switched off"
    if profiled:
        return "not captured: layers are timed one by one"
    # Of split engines, only the one that decodes matters.
    decoding = engines[choose_profile(profiles_of(engines), 1, 1, engines[0].file.name).engine]
    reason = decoding.capture_problem
    return f"not captured: lowering {decoding.lowering}, {reason}" if reason else None


def _profiler(module: Any, layer_seconds: dict[str, list[float]]) -> Any:
    class LayerTimes(module.IProfiler):  # type: ignore[misc]
        """Collects what TensorRT reports behind every step."""

        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            layer_seconds.setdefault(layer_name, []).append(ms / 1e3)

    return LayerTimes()
