"""What decides an engine's content: graph, weights, settings and versions, as hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import onnx_ir as ir

from dlo_export import __version__
from dlo_export.checkpoints.errors import EngineBuildError, InputError
from dlo_export.checkpoints.files.file_digest import known_sha256
from dlo_export.exporter.tensorrt.engine_request import EngineRequest
from dlo_export.exporter.weight_file import external_tensors
from dlo_export.runtimes.artefact.typed_json import to_json
from dlo_export.runtimes.tensorrt.backend import BACKENDS
from dlo_export.runtimes.tensorrt.gpu import find_gpu

# Counted up whenever the builder makes another engine of the same request.
_BUILDER = 2


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of one engine to build.

    Attributes:
        weight_bytes: Of the .onnx file and its external data files.
        plugin_library_sha256: Of the plugin library, where one is given.
        key: Of all that decides the engine's content, in hexadecimal.
    """

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
    library_sha256 = None if library is None else known_sha256(library)
    decisive = {
        "builder": [_BUILDER, __version__],
        "graph": known_sha256(request.graph),
        "weights": {file.name: known_sha256(file) for file in files},
        "backend": [backend.name, backend.version()],
        "targets": sorted(request.targets) or (find_gpu().target if backend.targets is None else "portable"),
        "profiles": [to_json(profile, request.graph.parent) for profile in request.profiles],
        "dtype": request.dtype,
        "lowering": request.lowering,
        "routed_layers": list(request.routed_layers),
        "expected_dtypes": dict(sorted(request.expected_dtypes.items())),
        "plugins": [*request.plugin_operators, library_sha256],
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    size = sum(file.stat().st_size for file in (request.graph, *files))
    return Fingerprint(size, library_sha256, key)


def data_files(graph: Path) -> list[Path]:
    """External data files of an ONNX graph, which must lie in its folder.

    Raises:
        InputError: The graph is missing or not ONNX, or a data file is missing or elsewhere.
    """
    if not graph.is_file():
        raise InputError(f"{graph}: no such file, expected an ONNX graph", hint="export again")
    try:
        model = ir.load(graph)
    except Exception as err:  # whatever the protobuf parser finds wrong
        raise InputError(f"{graph}: is not an ONNX graph: {err}", hint="export again") from err
    parts = (model.graph, *model.graph.subgraphs())
    locations = dict.fromkeys(str(tensor.location) for part in parts for tensor in external_tensors(part).values())
    files = []
    for location in locations:
        file = (graph.parent / location).resolve()
        if not file.is_relative_to(graph.parent.resolve()):
            raise InputError(
                f"{graph}: its data file {location} lies outside of its folder", hint="store it beside the graph"
            )
        if not file.is_file():
            raise InputError(f"{graph}: its data file {location} does not exist", hint="export without --no-weights")
        files.append(file)
    return files
