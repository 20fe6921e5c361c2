"""The GPU, through cuda-bindings, which is the CUDA runtime in Python: memory, one stream, captured graphs.

What follows `Device.__init__` needs a GPU and has not been run on one yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from dlo_export.runtimes.errors import BackendUnavailableError, RuntimeInputError

_CUDA_HINT = "`nvidia-smi` shows whether the GPU works and how much of its memory others use"


class CudaError(RuntimeInputError):
    """A CUDA call failed: out of memory, a lost device, or a capture that is not allowed."""

    exit_code: ClassVar[int] = 4


class Device:
    """The current CUDA device, with a stream of its own and the memory allocated from it.

    Raises:
        BackendUnavailableError: cuda-bindings, the driver or the GPU is missing.
    """

    def __init__(self) -> None:
        self._cuda = _cuda_runtime()
        self._allocations: list[int] = []
        self._stream: Any = None
        count = self._count()
        if not count:
            raise BackendUnavailableError(
                "TensorRT: the CUDA driver finds 0 GPUs, expected at least 1",
                hint="run it on a machine with an NVIDIA GPU, and check CUDA_VISIBLE_DEVICES",
            )
        attribute = self._cuda.cudaDeviceAttr
        index = self._call("cudaGetDevice")
        major = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, index)
        minor = self._call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, index)
        self.target = f"sm{major}{minor}"
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """Handle of the stream everything runs on; not the default one, which cannot be captured."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Address of new device memory.

        Args:
            size: Bytes.
        """
        address = int(self._call("cudaMalloc", size))
        self._allocations.append(address)
        return address

    def zero(self, address: int, size: int) -> None:
        """Queues zeroing memory.

        Args:
            address: Of device memory.
            size: Bytes.
        """
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def upload(self, array: np.ndarray, address: int) -> None:
        """Queues copying an array to the device; pageable memory is staged before the call returns."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        array = np.ascontiguousarray(array)
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, address: int, array: np.ndarray) -> None:
        """Queues copying device memory into a contiguous array, which holds it after `synchronize`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Waits for everything queued."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Captures what a function queues, without running it.

        Args:
            enqueue: Must not wait, allocate, or use another stream.

        Returns:
            The graph, for `launch` and `destroy`.

        Raises:
            CudaError: Something in it cannot be captured. The stream is usable again.
        """
        self._call("cudaStreamBeginCapture", self._stream, self._mode().cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self._stream)  # its status would only repeat that the capture broke
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Queues a captured graph."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: Any) -> None:
        """Frees a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Frees the stream and all memory."""
        addresses, self._allocations = self._allocations, []
        for address in addresses:
            self._call("cudaFree", address)
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._call("cudaStreamDestroy", stream)

    def _mode(self) -> Any:
        return self._cuda.cudaStreamCaptureMode

    def _count(self) -> int:
        try:
            return int(self._call("cudaGetDeviceCount"))
        except CudaError as err:
            no_device = "cudaErrorNoDevice" in err.message
            raise BackendUnavailableError(
                f"TensorRT: no GPU can be used: {err.message}",
                hint="run it on a machine with an NVIDIA GPU"
                + ("" if no_device else ", and install or update its driver: `nvidia-smi` must work"),
            ) from err

    def _call(self, function: str, *arguments: Any) -> Any:
        """Calls a function of the CUDA runtime; returns what it does beside its status.

        Raises:
            CudaError: With the status.
        """
        try:
            status, *results = getattr(self._cuda, function)(*arguments)
        except RuntimeError as err:  # the bindings raise where the driver's library cannot be loaded
            raise CudaError(f"{function}: {err}", hint=_CUDA_HINT) from err
        if int(status) != 0:
            _, text = self._cuda.cudaGetErrorString(status)
            raise CudaError(f"{function} failed with {status.name} ({int(status)}): {text.decode()}", hint=_CUDA_HINT)
        return results[0] if results else None


def _cuda_runtime() -> Any:
    try:
        from cuda.bindings import runtime  # noqa: PLC0415 - only who runs an engine needs it
    except ImportError as err:
        raise BackendUnavailableError(
            f"TensorRT: cuda-bindings cannot be imported: {err}", hint="pip install 'cuda-bindings>=13'"
        ) from err
    return runtime
