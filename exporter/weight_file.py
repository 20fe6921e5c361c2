"""One external data file for all of a graph's weights, written as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.files.file_digest import HashedFile

ALIGNMENT = 64  # bytes; a cache line, so that kernels reading mapped weights start on one
INLINE_BYTES = 256  # smaller tensors (axes, shapes, scalars) stay in the .onnx file, where shape inference sees them

# Called with the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class _Placed:
    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def save_weights(model: ir.Model, path: Path, *, write: bool = True, progress: Progress | None = None) -> int:
    """Moves a model's initializers into an external data file.

    Afterwards the initializers refer to the file, relative to the folder the model is saved in. The layout depends on
    the initializers alone, in the order of the graph, so two forms of one graph can share a file.

    Args:
        model: Its initializers are replaced.
        path: The file to write.
        write: False only lays the file out: the references are right, the file is not made.
        progress: Told after every tensor.

    Returns:
        Size of the file in bytes.
    """
    placed, total = _layout(model.graph)
    if write:
        with HashedFile(path) as file:
            for entry in placed:
                file.pad_to(entry.offset)
                entry.tensor.tofile(file)  # type: ignore[attr-defined]  # every tensor of onnx_ir has it
                if progress is not None:
                    progress(entry.offset + entry.tensor.nbytes, total)
    for entry in placed:
        entry.value.const_value = ir.ExternalTensor(
            path.name,
            entry.offset,
            entry.tensor.nbytes,
            entry.tensor.dtype,
            shape=ir.Shape(entry.tensor.shape.numpy()),
            name=entry.value.name or "",
            base_dir=path.parent,
        )
    return total


def weight_bytes(model: ir.Model) -> int:
    """Size in bytes of the file `save_weights` would write."""
    return _layout(model.graph)[1]


def weight_places(model: ir.Model) -> dict[str, tuple[int | None, int | None]]:
    """Offset and length of every weight that lies in an external data file."""
    return {name: (tensor.offset, tensor.length) for name, tensor in external_tensors(model.graph).items()}


def external_tensors(graph: ir.Graph) -> dict[str, ir.ExternalTensor]:
    """A graph's initializers that lie in external data files, by name."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


def _layout(graph: ir.Graph) -> tuple[list[_Placed], int]:
    placed: list[_Placed] = []
    end = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE_BYTES:
            continue
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        placed.append(_Placed(value, tensor, offset))
        end = offset + tensor.nbytes
    return placed, end
