"""One external data file for a graph's weights, written as a stream; those that lie in kept files stay there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
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

# Data files that stand in the artefact as they stood beside its source: names in its folder, by where tensors lie now.
KeptNames = Mapping[Path, str]
NOTHING_KEPT: KeptNames = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class _Placed:
    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def save_weights(
    model: ir.Model,
    path: Path,
    *,
    kept: KeptNames = NOTHING_KEPT,
    write: bool = True,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
) -> int:
    """Moves a model's initializers into an external data file.

    Afterwards the initializers refer to the file, relative to the folder the model is saved in. The layout depends on
    the initializers alone, in the order of the graph, so two forms of one graph can share a file.

    Args:
        model: Its initializers are replaced.
        path: The file to write; none where all weights lie in kept ones.
        kept: Weights that lie in these files stay there, and are read from their places in the folder of `path`.
        write: False only lays the file out: the references are right, the file is not made.
        progress: Told after every tensor.
        allow_nonfinite: Let a foreign graph's weights be NaN or infinite: those are looked at while they are written. A
            checkpoint's are where they are read.

    Returns:
        Size of the file in bytes.

    Raises:
        NonFiniteWeightError: A weight is not finite.
    """
    placed, total = _layout(model.graph, kept)
    staying = _kept_tensors(model.graph, kept)
    if write:
        streamed = {id(entry.tensor) for entry in placed} | {id(tensor) for _, tensor in staying}
        _check_inline_tensors(model.graph, streamed, allow_nonfinite=allow_nonfinite)
        if placed or not staying:
            _write(placed, path, lambda done: progress and progress(done, total), allow_nonfinite=allow_nonfinite)
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
    for value, tensor in staying:
        value.const_value = ir.ExternalTensor(
            kept[Path(tensor.path)],
            tensor.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            base_dir=path.parent,
        )
    return total


def _write(placed: list[_Placed], path: Path, tell: Callable[[int], object], *, allow_nonfinite: bool) -> None:
    with HashedFile(path) as file:
        for entry in placed:
            file.pad_to(entry.offset)
            looked_at = isinstance(entry.tensor, RowTensor) or allow_nonfinite
            entry.tensor.tofile(file if looked_at else FiniteWrites(file, entry.tensor))  # type: ignore[attr-defined]  # every tensor of onnx_ir has it
            tell(entry.offset + entry.tensor.nbytes)


def weight_bytes(model: ir.Model, kept: KeptNames = NOTHING_KEPT) -> int:
    """Size in bytes of the file `save_weights` would write."""
    return _layout(model.graph, kept)[1]


def weight_places(model: ir.Model) -> dict[str, tuple[str, int | None, int | None]]:
    """File, offset and length of every weight that lies in an external data file."""
    found = external_tensors(model.graph)
    return {name: (str(tensor.location), tensor.offset, tensor.length) for name, tensor in found.items()}


def external_tensors(graph: ir.Graph) -> dict[str, ir.ExternalTensor]:
    """A graph's initializers that lie in external data files, by name."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


class FiniteWrites:
    """Passes a tensor's bytes on to a file, and refuses those that are no finite numbers.

    Args:
        file: Takes them.
        tensor: Of a foreign graph; its elements come whole.
    """

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


def _kept_tensors(graph: ir.Graph, kept: KeptNames) -> list[tuple[ir.Value, ir.ExternalTensor]]:
    found = external_tensors(graph)
    return [(graph.initializers[name], tensor) for name, tensor in found.items() if Path(tensor.path) in kept]


def _layout(graph: ir.Graph, kept: KeptNames) -> tuple[list[_Placed], int]:
    placed: list[_Placed] = []
    staying = {id(tensor) for _, tensor in _kept_tensors(graph, kept)}
    end = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE_BYTES or id(tensor) in staying:
            continue
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        placed.append(_Placed(value, tensor, offset))
        end = offset + tensor.nbytes
    return placed, end
