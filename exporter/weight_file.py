"""One external data file for all of a graph's weights, written as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.files.file_digest import HashedFile
from dlo_export.checkpoints.finite_weights import NonFiniteWeightError, all_finite
from dlo_export.graph_passes.row_tensor import RowTensor

ALIGNMENT = 64  # bytes; a cache line, so that kernels reading mapped weights start on one
INLINE_BYTES = 256  # smaller tensors (axes, shapes, scalars) stay in the .onnx file, where shape inference sees them

# Called with the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class _Placed:
    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def save_weights(
    model: ir.Model,
    path: Path,
    *,
    write: bool = True,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
) -> int:
    """Moves a model's initializers into an external data file.

    Afterwards the initializers refer to the file, relative to the folder the model is saved in. The layout depends on
    the initializers alone, in the order of the graph, so two forms of one graph can share a file.

    Args:
        model: Its initializers are replaced.
        path: The file to write.
        write: False only lays the file out: the references are right, the file is not made.
        progress: Told after every tensor.
        allow_nonfinite: Let a foreign graph's weights be NaN or infinite: those are looked at while they are written. A
            checkpoint's are where they are read.

    Returns:
        Size of the file in bytes.

    Raises:
        NonFiniteWeightError: A weight is not finite.
    """
    placed, total = _layout(model.graph)
    if write:
        streamed = {id(entry.tensor) for entry in placed}
        _check_inline_tensors(model.graph, streamed, allow_nonfinite=allow_nonfinite)
        with HashedFile(path) as file:
            for entry in placed:
                file.pad_to(entry.offset)
                looked_at = isinstance(entry.tensor, RowTensor) or allow_nonfinite
                entry.tensor.tofile(file if looked_at else _FiniteWrites(file, entry.tensor))  # type: ignore[attr-defined]  # every tensor of onnx_ir has it
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


class _FiniteWrites:
    """Passes a tensor's bytes on to a file, and refuses those that are no finite numbers."""

    def __init__(self, file: HashedFile, tensor: ir.TensorProtocol) -> None:
        self._file = file
        self._tensor = tensor
        self._done = 0

    def write(self, data: Any) -> int:
        """As `HashedFile.write`."""
        dtype, chunk = self._tensor.dtype.numpy(), memoryview(data).cast("B")
        # Types of less than a byte are packed, and have neither NaN nor infinity.
        if chunk.nbytes % dtype.itemsize == 0:
            values = np.frombuffer(chunk, dtype)
            _check_graph_tensor(values, self._tensor, self._done)
            self._done += values.size
        return self._file.write(data)


def _check_inline_tensors(graph: ir.Graph, placed: set[int], *, allow_nonfinite: bool) -> None:
    """What stays in the .onnx file: small initializers, constants."""
    tensors = [value.const_value for value in graph.initializers.values()]
    constants = [node for node in graph.all_nodes() if node.op_type == "Constant" and "value" in node.attributes]
    tensors += [node.attributes["value"].as_tensor() for node in constants]
    for tensor in tensors:
        if tensor is None or id(tensor) in placed:
            continue
        if isinstance(tensor, RowTensor):
            tensor.numpy()  # raises what it has to say here, not from within onnx_ir's writer
        elif tensor.dtype.is_floating_point() and not allow_nonfinite:
            _check_graph_tensor(tensor.numpy().reshape(-1), tensor, 0)


def _check_graph_tensor(values: np.ndarray, tensor: ir.TensorProtocol, first: int) -> None:
    """Refuses weights of a foreign graph that are not finite.

    Args:
        values: Elements in a row.
        tensor: Which they are of.
        first: Index of the first one, the tensor taken as a row.
    """
    if all_finite(values):
        return
    # No weights: a bound of one element, or a mask, nothing but zeros and negative infinity.
    wide = values.astype(np.float64)
    if bool(np.isin(wide, (0.0, -np.inf)).all()) or (tensor.size == 1 and not np.isnan(wide).any()):
        return
    place = int(np.argmin(np.isfinite(wide)))
    # The pass that injects layers has renumbered those behind: the place in the file tells which it was.
    origin = "the graph"
    if isinstance(tensor, ir.ExternalTensor):
        origin = f"{tensor.path}, tensor at byte {tensor.offset or 0}"
    index = np.unravel_index(first + place, tensor.shape.numpy())
    raise NonFiniteWeightError(
        origin, tensor.name or "a constant without a name", [*map(int, index)], float(wide[place])
    )


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
