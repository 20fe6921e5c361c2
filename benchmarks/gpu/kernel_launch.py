"""Launches an image through the CUDA driver on PyTorch's tensors: PyTorch's streams, graphs and events serve."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from benchmarks.kernel_images import Image
from dlo_export.checkpoints.errors import MachineError
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.contract import weight_input

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_WITHOUT_OPT_IN = 48 * 1024


class RefusedError(MachineError):
    """The driver refused a call: the message has its name and the driver's word for why."""


class LoadedImage:
    """An image in the current device's primary context, which PyTorch made.

    Args:
        image: What it is.
        folder: Where its file lies.

    Raises:
        RefusedError: The driver does not take the code, or not so much shared memory.
    """

    def __init__(self, image: Image, folder: Path) -> None:
        self.image = image
        self._driver = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        code = (folder / image.file).read_bytes()
        self._call("cuModuleLoadData", ctypes.byref(module), code)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, image.entry.encode())
        if image.shared_bytes > _WITHOUT_OPT_IN:
            self._call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, image.shared_bytes)

    def __call__(self, *operands: Any) -> None:
        """Launches on PyTorch's current stream.

        Args:
            *operands: The schema's inputs, then the output: contiguous tensors on the device.
        """
        import torch  # noqa: PLC0415 - heavy

        op = PLUGIN_OPS[self.image.op_name]
        inputs, output = operands[: len(op.inputs)], operands[len(op.inputs)]
        batch, sequence, _ = inputs[0].shape
        depth, columns = inputs[weight_input(op)].shape
        tokens = batch * sequence
        values = [
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs),
            *(ctypes.c_int32(size) for size in (tokens, depth, columns)),
            ctypes.c_void_p(output.data_ptr()),
        ]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid_x, grid_y = self.image.sizes.grid(tokens, columns)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (self.image.threads, 1, 1)
        shared = self.image.shared_bytes
        self._call("cuLaunchKernel", self._function, grid_x, grid_y, 1, *block, shared, stream, parameters, None)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown"
            raise RefusedError(
                f"{self.image.file}: {name} says {reason} ({status})", hint="an image fits one compute capability alone"
            )
