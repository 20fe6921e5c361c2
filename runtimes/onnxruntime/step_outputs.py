"""What a step shows beside its cache, brought to the host: all of it, or of the logits the last token's alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints.interface import LOGITS
from dlo_export.runtimes.decoder_interface import DecoderInterface
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory
from dlo_export.runtimes.runner import StepRequest


class StepOutputs:
    """Binds the observed outputs of a step and reads them behind it.

    On the host ONNX Runtime allocates them itself. A provider with memory of its own writes them there, into buffers
    that are kept: of a prompt's logits, all but the last row then never leave the GPU.

    Args:
        interface: Of the graph.
        new_memory: Where they are kept; None leaves them to ONNX Runtime, in the host's memory.
    """

    def __init__(self, interface: DecoderInterface, new_memory: Callable[[], DeviceMemory] | None) -> None:
        self._interface = interface
        self._new_memory = new_memory
        self._kept: dict[str, DeviceMemory] = {}
        self._shapes: dict[str, tuple[int, ...] | None] = {}

    def bind(self, binding: ort.IOBinding, request: StepRequest) -> None:
        """Binds them all; must come before other outputs are bound."""
        self._shapes = {}
        for name in self._interface.observed(hidden_states=request.hidden_states):
            shape = self._interface.step_shape(name, *request.input_ids.shape)
            if shape is None or self._new_memory is None:
                binding.bind_output(name, "cpu")
                self._shapes[name] = None
                continue
            self._shapes[name] = shape
            kind, memory = self._interface.element_type(name), self._kept.get(name) or self._new_memory()
            self._kept[name] = memory
            memory.reserve(math.prod(shape) * kind.itemsize)
            memory.bind_output(binding, name, kind, shape)

    def read(self, request: StepRequest, outputs: Callable[[], Sequence[ort.OrtValue]]) -> dict[str, np.ndarray]:
        """By name, in the graph's types; logits [batch, 1, vocab] where only the last token's were asked for.

        Args:
            request: What was asked for.
            outputs: Gives all that were bound, in their order. Asked where ONNX Runtime allocates some, and only there:
                it makes an object of every one of them, the cache's too.
        """
        values = outputs() if None in self._shapes.values() else ()
        found = {}
        for index, (name, shape) in enumerate(self._shapes.items()):
            if shape is None:
                found[name] = values[index].numpy()
            elif name == LOGITS and request.last_logits and shape[1] > 1:
                found[name] = self._last_rows(name, shape)
            else:
                found[name] = self._kept[name].read(self._interface.element_type(name), shape)
        return found

    def _last_rows(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        batch, sequence, width = shape
        ends = [(row * sequence + sequence - 1) * width for row in range(batch)]
        rows = [self._kept[name].read(self._interface.element_type(name), (1, 1, width), end) for end in ends]
        return np.concatenate(rows)
