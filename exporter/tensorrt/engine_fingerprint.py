"""What decides an engine's content: graph, weights, settings and versions, as hashes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from dlo_export import __version__
from dlo_export.checkpoints.errors import EngineBuildError, InputError
from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.exporter.tensorrt.backend import BACKENDS
from dlo_export.exporter.tensorrt.engine_gpu import find_gpu
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.weight_file import external_tensors

# Counted up whenever the builder makes another engine of the same request.
_BUILDER = 1


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of one engine to build.

    Attributes:
        graph_sha256: Of the .onnx file.
        weights_sha256: Of each external data file, by its name.
        weight_bytes: Of all of them and of the .onnx file.
        plugin_library_sha256: Of the plugin library, where one is given.
        key: Of all that decides the engine's content, in hexadecimal.
    """

    graph_sha256: str
    weights_sha256: Mapping[str, str]
    weight_bytes: int
    plugin_library_sha256: str | None
    key: str


def fingerprint(request: EngineRequest) -> Fingerprint:
    """Reads the graph and its weights once, as a stream.

    Raises:
        InputError: The graph is missing or not ONNX, or a data file of it is missing or elsewhere.
        EngineBuildError: The plugin library is missing.
    """
    files = data_files(request.graph)
    library = request.plugin_library
    if library is not None and not library.is_file():
        raise EngineBuildError(
            f"plugin library {library}: no such file, expected libdlo_plugins.so",
            hint="build it (docs/tensorrt.md says how), or leave it out to build with the Python twins",
        )
    backend = BACKENDS[request.backend]
    graph_sha256 = sha256_of(request.graph)
    weights = {file.name: sha256_of(file) for file in files}
    library_sha256 = None if library is None else sha256_of(library)
    decisive = {
        "builder": [_BUILDER, __version__],
        "graph": graph_sha256,
        "weights": weights,
        "backend": [backend.name, backend.version()],
        "targets": sorted(request.targets) or (find_gpu().target if backend.targets is None else "portable"),
        "profiles": [profile.to_json() for profile in request.profiles],
        "dtype": request.dtype,
        "lowering": request.lowering,
        "routed_layers": list(request.routed_layers),
        "expected_dtypes": dict(sorted(request.expected_dtypes.items())),
        "plugins": library_sha256,
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    size = sum(file.stat().st_size for file in (request.graph, *files))
    return Fingerprint(graph_sha256, weights, size, library_sha256, key)


def data_files(graph: Path) -> list[Path]:
    """External data files of an ONNX graph, which must lie in its folder.

    Raises:
        InputError: The graph is missing or not ONNX, or a data file is missing or elsewhere.
    """
    if not graph.is_file():
        raise InputError(f"{graph}: no such file, expected an ONNX graph")
    try:
        model = ir.load(graph)
    except Exception as err:  # whatever the protobuf parser finds wrong
        raise InputError(f"{graph}: is not an ONNX graph: {err}") from err
    parts = (model.graph, *model.graph.subgraphs())
    locations = dict.fromkeys(str(tensor.location) for part in parts for tensor in external_tensors(part).values())
    files = []
    for location in locations:
        file = (graph.parent / location).resolve()
        if not file.is_relative_to(graph.parent.resolve()):
            raise InputError(f"{graph}: its data file {location} lies outside of its folder")
        if not file.is_file():
            raise InputError(f"{graph}: its data file {location} does not exist", hint="export without --no-weights")
        files.append(file)
    return files


def sha256_of(file: Path) -> str:
    """Of a file's content; a file that did not change since is not read again."""
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, size: int, modified: int, inode: int) -> str:
    return file_sha256(file)
