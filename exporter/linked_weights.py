"""Weights that lie behind links, as in a hub's cache: ONNX Runtime follows none out of the folder it is told of."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from dlo_export.exporter.weight_file import external_tensors


def leads_out(folder: Path, files: Iterable[Path]) -> bool:
    """Whether any of a folder's files is a link to somewhere else."""
    root = folder.resolve()
    return any(not file.resolve().is_relative_to(root) for file in files)


def weights_folder(model: ir.Model, folder: Path) -> Path:
    """The folder that a graph's external data are named from, for whoever runs the graph from memory.

    Where links lead out of the graph's own, that is one which holds all they lead to; the graph's weights then have
    other names, in place, so it must not be written. Whether the files are the right ones, their description tells.

    Args:
        model: Its external data are initializers of its main graph alone.
        folder: That it lies in.
    """
    external = external_tensors(model.graph)
    places = {str(tensor.location): (folder / str(tensor.location)).resolve() for tensor in external.values()}
    if not leads_out(folder, places.values()):
        return folder
    root = Path(os.path.commonpath([place.parent for place in places.values()]))
    for name, tensor in external.items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            places[str(tensor.location)].relative_to(root).as_posix(),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=root,
        )
    return root
