"""External data files of a graph's weights, written as a stream: one, or as many as a size asks for.

Weights that lie in files which are kept (`kept_data.py`) stay there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.files.file_digest import HashedFile
from dlo_export.checkpoints.finite_weights import NonFiniteWeightError, all_finite
from dlo_export.checkpoints.llama_layer import parse_router
from dlo_export.graph_passes.row_tensor import RowTensor
from dlo_export.runtimes.artefact.description import ADDED_NAME, WEIGHTS_NAME

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
    number: int  # of the file
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.tensor.nbytes


def save_weights(
    model: ir.Model,
    path: Path,
    *,
    kept: KeptNames = NOTHING_KEPT,
    write: bool = True,
    file_bytes: int | None = None,
    progress: Progress | None = None,
    allow_nonfinite: bool = False,
) -> int:
    """Moves a model's initializers into an external data file, or several.

    Afterwards the initializers refer to the files, relative to the folder the model is saved in. The layout depends on
    the initializers alone, in the order of the graph, so two forms of one graph can share a file.

    Args:
        model: Its initializers are replaced.
        path: The file to write, none where all weights lie in kept ones; further ones are called as `numbered_weights`
            says.
        kept: Weights that lie in these files stay there, and are read from their places in the folder of `path`.
        write: False only lays the file out: the references are right, the file is not made.
        file_bytes: Of a file at most; a larger tensor has one of its own. None puts all into one.
        progress: Told after every tensor.
        allow_nonfinite: Let a foreign graph's weights be NaN or infinite: those are looked at while they are written. A
            checkpoint's are where they are read.

    Returns:
        Size of the files in bytes.

    Raises:
        NonFiniteWeightError: A weight is not finite.
    """
    staying = _kept_tensors(model.graph, kept)
    placed = _layout(_written_tensors(model.graph, kept), file_bytes)
    if write:
        streamed = {id(entry.tensor) for entry in placed} | {id(tensor) for _, tensor in staying}
        _check_inline_tensors(model.graph, streamed, allow_nonfinite=allow_nonfinite)
        if placed or not staying:
            _write(placed, path, progress, allow_nonfinite=allow_nonfinite)
    _refer(placed, path)
    for value, tensor in staying:
        value.const_value = _reference(value, tensor, kept[Path(tensor.path)], tensor.offset or 0, path.parent)
    return _total(placed)


def _write(placed: Sequence[_Placed], path: Path, progress: Progress | None, *, allow_nonfinite: bool) -> None:
    files = {number: list(entries) for number, entries in itertools.groupby(placed, lambda entry: entry.number)}
    done, total = 0, _total(placed)
    for number, entries in (files or {0: []}).items():
        with HashedFile(numbered_weights(path, number), total=total) as file:
            for entry in entries:
                file.pad_to(entry.offset)
                looked_at = isinstance(entry.tensor, RowTensor) or allow_nonfinite
                entry.tensor.tofile(file if looked_at else FiniteWrites(file, entry.tensor))  # type: ignore[attr-defined]  # every tensor of onnx_ir has it
                if progress is not None:
                    progress(done + entry.end, total)
        done += entries[-1].end if entries else 0


def leave_weights_out(model: ir.Model, path: Path, *, file_bytes: int | None = None) -> None:
    """Makes a model's initializers refer to files that are not made, the smallest weights too; reads none of them.

    Args:
        model: Its initializers are replaced. What is no weight, such as an axis, stays in the .onnx file.
        path: As for `save_weights`.
        file_bytes: Likewise.
    """
    weights = [
        value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, RowTensor) or parse_router(name) is not None
    ]
    _refer(_layout(list(dict.fromkeys((*_large_tensors(model.graph), *weights))), file_bytes), path)


def _refer(placed: Sequence[_Placed], path: Path) -> None:
    for entry in placed:
        file = numbered_weights(path, entry.number)
        entry.value.const_value = _reference(entry.value, entry.tensor, file.name, entry.offset, path.parent)


def _reference(value: ir.Value, tensor: ir.TensorProtocol, name: str, offset: int, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name or "",
        base_dir=folder,
    )


def numbered_weights(first: Path, number: int) -> Path:
    """Where the weights go on that do not fit the first file of them: model.onnx.data_1, then model.onnx.data_2.

    Args:
        first: The first file; `number` 0.
        number: Of the file.
    """
    return first.with_name(f"{first.name}_{number}") if number else first


def weight_paths(folder: Path, kept: Iterable[Path] = ()) -> list[Path]:
    """The files of model.onnx's weights that are in a folder: those that were kept, then those that were written.

    Args:
        folder: The artefact.
        kept: The first, in their order.
    """
    paths = list(kept)
    for first in (WEIGHTS_NAME, ADDED_NAME):
        numbered = (numbered_weights(folder / first, number) for number in itertools.count())
        paths += itertools.takewhile(Path.is_file, numbered)
    return list(dict.fromkeys(paths))


def weight_bytes(model: ir.Model, kept: KeptNames = NOTHING_KEPT) -> int:
    """Size in bytes of the file `save_weights` would write."""
    return _total(_layout(_written_tensors(model.graph, kept), None))


def weight_places(model: ir.Model) -> dict[str, tuple[str, int | None, int | None]]:
    """File, offset and length of every weight that lies in an external data file."""
    found = external_tensors(model.graph)
    return {name: (str(tensor.location), tensor.offset, tensor.length) for name, tensor in found.items()}


def take_weights(model: ir.Model, stored: Mapping[str, ir.ExternalTensor]) -> set[str]:
    """Has a model refer to weights that were written for another form of it.

    Args:
        model: Initializers of the same name, type and shape are replaced, and routers, which a form has as a column
            or as a row, of as many elements.
        stored: Of the other form, by name.

    Returns:
        Names of large weights that only one of the two forms has.
    """
    large, taken = {value.name or "" for value in _large_tensors(model.graph)}, set()
    for name in large & stored.keys():
        value, found = model.graph.initializers[name], stored[name]
        own = value.const_value
        assert own is not None, "it was counted by its size"
        alike = own.size == found.size if parse_router(name) is not None else own.shape.numpy() == found.shape.numpy()
        if alike and own.dtype == found.dtype:
            value.const_value = with_axes(found, own.shape.numpy())
            taken.add(name)
    return (large | stored.keys()) - taken


def with_axes(stored: ir.TensorProtocol, sizes: Sequence[int]) -> ir.TensorProtocol:
    """A stored weight with the axes that a graph wants, from where it lies.

    Args:
        stored: Of as many elements.
        sizes: Of the axes.
    """
    if tuple(sizes) == tuple(stored.shape.numpy()):
        return stored
    if not isinstance(stored, ir.ExternalTensor):
        return ir.tensor(stored.numpy().reshape(sizes), name=stored.name)
    return ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        stored.dtype,
        shape=ir.Shape(sizes),
        name=stored.name or "",
        base_dir=stored.base_dir,
    )


def external_tensors(graph: ir.Graph) -> dict[str, ir.ExternalTensor]:
    """A graph's initializers that lie in external data files, by name."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}


def stored_bytes(tensor: ir.ExternalTensor) -> bytes:
    """A tensor as it lies in its file, which may have several names: onnx_ir refuses to read such a file."""
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        return file.read(tensor.nbytes)


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


def _large_tensors(graph: ir.Graph) -> list[ir.Value]:
    """Initializers that do not stay in the .onnx file."""
    values = graph.initializers.values()
    return [value for value in values if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES]


def _kept_tensors(graph: ir.Graph, kept: KeptNames) -> list[tuple[ir.Value, ir.ExternalTensor]]:
    found = external_tensors(graph)
    return [(graph.initializers[name], tensor) for name, tensor in found.items() if Path(tensor.path) in kept]


def _written_tensors(graph: ir.Graph, kept: KeptNames) -> list[ir.Value]:
    """Initializers that stay neither in the .onnx file nor in kept ones."""
    staying = {id(value) for value, _ in _kept_tensors(graph, kept)}
    return [value for value in _large_tensors(graph) if id(value) not in staying]


def _layout(values: Sequence[ir.Value], file_bytes: int | None) -> list[_Placed]:
    placed: list[_Placed] = []
    number = end = 0
    for value in values:
        tensor = value.const_value
        assert tensor is not None, "only what has a tensor is placed"
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if file_bytes is not None and offset and offset + tensor.nbytes > file_bytes:
            number, offset = number + 1, 0
        placed.append(_Placed(value, tensor, number, offset))
        end = placed[-1].end
    return placed


def _total(placed: Sequence[_Placed]) -> int:
    """Size of all files."""
    return sum({entry.number: entry.end for entry in placed}.values())
