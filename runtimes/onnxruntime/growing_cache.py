"""The KV cache of a graph that returns a longer one with every step: two sets of buffers that take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints.dtypes import ElementType
from dlo_export.runtimes.onnxruntime.device_memory import DeviceMemory

# Tokens a new buffer has room for beyond those it is needed for; untouched pages of it cost no memory.
_HEADROOM = 256


class GrowingCache:
    """Past and present of a decoder, bound to memory that is allocated once in many steps, where the provider computes.

    Left to ONNX Runtime, every step allocates a present for every layer anew, which costs SmolLM2-135M 7 % of a decode
    step behind 128 tokens. A past is bound as the value that the step before returned, which costs the host less than
    to name its memory by device and address.

    Args:
        states: Shape and element type of every state input before the first token; its axis of size 0 grows.
        present_of: State input to the output that continues it.
        new_memory: Where it lies.
    """

    def __init__(
        self,
        states: Mapping[str, tuple[tuple[int, ...], ElementType]],
        present_of: Mapping[str, str],
        new_memory: Callable[[], DeviceMemory],
    ) -> None:
        self._states = states
        self._present_of = present_of
        self._past = 0
        self._next = 0
        self._values: dict[str, ort.OrtValue] = {}
        self._read = {name: new_memory() for name in states}
        self._write = {name: new_memory() for name in states}

    def bind(self, binding: ort.IOBinding, sequence: int) -> None:
        """Binds the past, and buffers for the present behind `sequence` more tokens; no outputs after it."""
        self._next = self._past + sequence
        for name, (sizes, kind) in self._states.items():
            present, new = self._write[name], _with_tokens(sizes, self._next)
            if present.bytes < math.prod(new) * kind.itemsize:
                room = _with_tokens(sizes, self._next + self._next // 2 + _HEADROOM)
                present.reserve(math.prod(room) * kind.itemsize)
            if name in self._values:
                binding.bind_ortvalue_input(name, self._values[name])
            else:
                past, old = self._read[name], _with_tokens(sizes, self._past)
                past.reserve(math.prod(old) * kind.itemsize)
                past.bind_input(binding, name, kind, old)
            present.bind_output(binding, self._present_of[name], kind, new)

    def advance(self, outputs: Sequence[ort.OrtValue]) -> None:
        """After the step: what was written is read next.

        Args:
            outputs: All that were bound, in their order.
        """
        self._values = dict(zip(self._states, outputs[-len(self._states) :], strict=True))
        self._past = self._next
        self._read, self._write = self._write, self._read

    def repeat(self, branches: int) -> None:
        """Makes so many equal sequences of one."""
        self._values = {}
        for name, memory in self._read.items():
            sizes, kind = self._states[name]
            past = memory.read(kind, _with_tokens(sizes, self._past))
            memory.write(np.repeat(past, branches, 0))
        self._states = {name: ((branches, *shape[1:]), kind) for name, (shape, kind) in self._states.items()}


def _with_tokens(sizes: tuple[int, ...], tokens: int) -> list[int]:
    return [size or tokens for size in sizes]
