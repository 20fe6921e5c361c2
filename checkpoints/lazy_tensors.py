"""Tensors that are read when they are needed, and their streaming into a safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

_CHUNK_BYTES = 64 << 20
_SAFETENSORS_TYPES: dict[np.dtype, str] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
}


class LazyTensor(Protocol):
    """What a checkpoint's tensors offer: shape and dtype at no cost, values on request."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, as the checkpoint stores them."""

    @property
    def dtype(self) -> np.dtype:
        """Element type of `numpy()`; bfloat16 is `ml_dtypes.bfloat16`."""

    def numpy(self) -> np.ndarray:
        """Reads the values, possibly as a view of the mapped file."""

    def release(self) -> None:
        """Gives the memory that reading took back to the system."""


@dataclass(frozen=True)
class ArrayTensor:
    """An array that is in memory already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Element type of the array."""
        return self.array.dtype

    def numpy(self) -> np.ndarray:
        """Returns the array itself."""
        return self.array

    def release(self) -> None:
        """Nothing to release: the array belongs to whoever made it."""


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor of an open safetensors file, read anew by each `numpy()`."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def numpy(self) -> np.ndarray:
        """Reads the tensor into an array of its own."""
        values: np.ndarray = self.file.get_tensor(self.name)
        return values

    def release(self) -> None:
        """Nothing is kept between reads."""


def tensor_nbytes(tensor: LazyTensor) -> int:
    """Bytes of a tensor's values, without reading them."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def save_safetensors(tensors: Mapping[str, LazyTensor], path: Path, *, progress: Progress | None = None) -> None:
    """Writes tensors to one safetensors file, holding one of them in memory at a time.

    Args:
        tensors: Names and tensors; float32, float16, bfloat16 or float64. Each is released after it was written.
        path: The file to create.
        progress: Called after every chunk of at most 64 MB.

    Raises:
        ValueError: A dtype safetensors files of models do not hold.
        OSError: The file cannot be written.
    """
    total = sum(tensor_nbytes(tensor) for tensor in tensors.values())
    done = 0
    with open(path, "wb") as file:
        file.write(_header(tensors))
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.numpy())
            for chunk in _chunks(values):
                file.write(chunk)
                done += chunk.nbytes
                if progress is not None:
                    progress(done, total)
            del values
            tensor.release()
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    """The length-prefixed JSON header of a safetensors file, padded so that the data starts 8-byte aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _SAFETENSORS_TYPES:
            raise ValueError(
                f"safetensors file: {name} has dtype {tensor.dtype}, expected one of "
                f"{', '.join(str(dtype) for dtype in _SAFETENSORS_TYPES)}\n\nhint: cast the tensor first"
            )
        end = offset + tensor_nbytes(tensor)
        dtype = _SAFETENSORS_TYPES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(values: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in pieces of at most 64 MB, without a copy."""
    flat = values.reshape(-1).view(np.uint8)
    for start in range(0, flat.nbytes, _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].data
