"""Memory where a provider computes: the host's, or a GPU's. ONNX Runtime reads and writes it where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort

from dlo_export.checkpoints.dtypes import BFLOAT16, UINT16, ElementType
from dlo_export.runtimes.onnxruntime.machine_faults import check_machine
from dlo_export.runtimes.onnxruntime.providers import Provider


class DeviceMemory:
    """Bytes of one purpose, allocated anew only when more are needed than there are.

    Args:
        session: Open, and so has loaded what allocates.
        provider: That it runs on.
    """

    def __init__(self, session: ort.InferenceSession, provider: Provider) -> None:
        self._session = session
        self._any_output = session.get_outputs()[0].name
        self._place = (provider.device, provider.device_id)
        self._value: ort.OrtValue | None = None
        self._part: tuple[object, ort.OrtValue] | None = None  # what was read last, and from where
        self._bytes = 0
        self._address = 0

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self._bytes

    def reserve(self, count: int) -> None:
        """Makes so many bytes of it, at least; what was in them is lost where they were fewer.

        Untouched pages of the host's memory are not taken from the system.

        Raises:
            BackendUnavailableError: There are not so many.
        """
        if self._bytes < count or self._value is None:
            shape = [max(1, count)]
            self._replace(count, lambda: ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, *self._place))

    def write(self, array: np.ndarray) -> None:
        """Holds these bytes from now on, and no others. On the host the array itself is taken.

        Raises:
            BackendUnavailableError: There is no room for them.
        """
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        held = raw if raw.size else np.zeros(1, np.uint8)
        self._replace(raw.size, lambda: ort.OrtValue.ortvalue_from_numpy(held, *self._place))

    def overwrite(self, array: np.ndarray) -> None:
        """Copies these bytes to where they lie from now on: what is bound, or captured in a CUDA graph, reads them.

        The first call is a `write` of a copy.
        """
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if self._value is None:
            self.write(raw.copy())
            return
        assert raw.size == self._bytes, "what is bound has one size"
        self._value.update_inplace(raw)

    def read(self, kind: ElementType, shape: Sequence[int], first: int = 0) -> np.ndarray:
        """A copy in the host's memory.

        Args:
            kind: Of the elements.
            shape: Of the array.
            first: Index of its first element.
        """
        place = self._address + first * kind.itemsize
        asked = (kind, tuple(shape), place)
        if self._part is None or self._part[0] != asked:
            # A binding makes a value of any part of memory without copying it, under the name of some output; nothing
            # is run. NumPy has no bfloat16: its bits are taken.
            part = self._session.io_binding()
            stored = UINT16 if kind == BFLOAT16 else kind
            part.bind_output(self._any_output, *self._place, stored.onnx_number, list(shape), place)
            self._part = asked, part.get_outputs()[0]
        return np.array(self._part[1].numpy(), copy=True).view(kind.numpy)

    def bind_input(
        self, binding: ort.IOBinding, name: str, kind: ElementType, shape: Sequence[int], first: int = 0
    ) -> None:
        """Has an input read from here, from element `first` on."""
        place = self._place_of(kind, shape, first)
        binding.bind_input(name, *self._place, kind.onnx_number, list(shape), place)

    def bind_output(
        self, binding: ort.IOBinding, name: str, kind: ElementType, shape: Sequence[int], first: int = 0
    ) -> None:
        """Has an output written here, from element `first` on."""
        place = self._place_of(kind, shape, first)
        binding.bind_output(name, *self._place, kind.onnx_number, list(shape), place)

    def _replace(self, count: int, make: Callable[[], ort.OrtValue]) -> None:
        """Drops what there is first, so that both need not fit at once: where nothing can be made, nothing is there."""
        self._value, self._bytes, self._address = None, 0, 0
        try:
            self._value = make()
        except Exception as err:  # ONNX Runtime's exceptions derive from Exception itself
            check_machine(f"{count} bytes on {self._place[0]}", err)
            raise
        self._bytes, self._address = count, int(self._value.data_ptr())

    def _place_of(self, kind: ElementType, shape: Sequence[int], first: int) -> int:
        assert (first + math.prod(shape)) * kind.itemsize <= self._bytes, "ONNX Runtime would write beyond it"
        return self._address + first * kind.itemsize
