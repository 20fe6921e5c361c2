"""Writes safetensors files as a stream.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.checkpoints.dtypes import BY_NAME, BY_NUMPY, FLOATS
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.direct_file import open_forwards
from dlo_export.checkpoints.finite_weights import check_finite
from dlo_export.checkpoints.lazy_tensors import LazyTensor, Progress, rows_at_once

WRITTEN_TYPES = (*FLOATS, BY_NAME["float64"])
"""What weights are written as."""


def save_safetensors(tensors: Mapping[str, LazyTensor], path: Path, *, progress: Progress | None = None) -> None:
    """Writes tensors to one safetensors file, holding at most 64 MB of one of them in memory at a time.

    Args:
        tensors: Names and tensors; float32, float16, bfloat16 or float64.
        path: The file to create.
        progress: Called after every chunk.

    Raises:
        InputError: A dtype that weights are not written as.
        NonFiniteWeightError: A value is NaN or infinite.
        OSError: The file cannot be written.
    """
    header = _header(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    with open_forwards(path, total) as file:
        file.write(header)
        for name, tensor in tensors.items():
            for chunk in _chunks(tensor):
                check_finite(chunk, name, path.name)
                # As bytes: bfloat16 has no buffer format of its own.
                file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
                tensor.release()
                done += chunk.nbytes
                if progress is not None:
                    progress(done, total)
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    """The length-prefixed JSON header of a safetensors file, padded so that the data starts 8-byte aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        kind = BY_NUMPY.get(tensor.dtype)
        if kind not in WRITTEN_TYPES:
            raise InputError(
                f"safetensors file: {name} has dtype {tensor.dtype}, expected one of "
                f"{', '.join(written.name for written in WRITTEN_TYPES)}",
                hint="cast the tensor first",
            )
        end = offset + tensor.nbytes
        entries[name] = {"dtype": kind.safetensors, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: LazyTensor) -> Iterator[np.ndarray]:
    if not tensor.shape:  # a scalar has no rows
        yield tensor.numpy()
        return
    step = rows_at_once(tensor.shape[0], tensor.nbytes)
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0]))
