"""What is known of a built engine, as dlo_artifact.json says it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from dlo_export.exporter.tensorrt.engine_request import BackendName, OptimizationProfile

# What describes a graph's plugins to the builder.
PluginSource = Literal["none", "library", "twins", "quick-deploy"]


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What a stage of a build took.

    Attributes:
        name: "import", "parse", "checks", "build" or "write".
        seconds: Wall time.
        peak_bytes: Largest resident memory of the building process during the stage.
    """

    name: str
    seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class LayerCensus:
    """Layers of the parsed network by type, before the builder fuses any.

    Attributes:
        total: Number of layers by TensorRT's type name.
        skipping: By routed decoder layer: the layers that carry its skip mechanism.
    """

    total: Mapping[str, int]
    skipping: Mapping[int, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """JSON has text keys only."""
        return {
            "total": dict(self.total),
            "skipping": {str(layer): dict(types) for layer, types in self.skipping.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerCensus:
        """The inverse of `to_json`."""
        return cls(values["total"], {int(layer): types for layer, types in values["skipping"].items()})


@dataclasses.dataclass(frozen=True)
class EngineRecord:
    """A built engine.

    Attributes:
        file: The engine.
        graph: The .onnx it was built from.
        backend: "rtx" or "tensorrt".
        version: Of the backend; engines run only in the version that built them.
        targets: GPUs it is for; empty: every GPU from sm80 on.
        profiles: In the engine's order.
        lowering: What routed layers became.
        dtype: Of weights, KV cache and logits.
        plugins: What described the plugins to the builder. An engine built with the library or with twins needs the
            library to run; with quick-deploy plugins it carries their kernels.
        plugin_library_sha256: Of the library, where one was loaded.
        stages: In order.
        peak_bytes: Largest resident memory of the building process.
        census: Layers of the network.
        decomposed_attentions: Attentions the builder was allowed to take apart.
        checks: Checks the network passed.
        bytes: Size of the engine.
        sha256: Of the engine.
        graph_sha256: Of the .onnx file.
        weights_sha256: Of each external data file, by its name.
        cache_key: Of the engine cache.
        from_cache: Whether this engine was copied from the cache; the stages are then those of the original build.
    """

    file: Path
    graph: Path
    backend: BackendName
    version: str
    targets: tuple[str, ...]
    profiles: tuple[OptimizationProfile, ...]
    lowering: str
    dtype: str
    plugins: PluginSource
    plugin_library_sha256: str | None
    stages: tuple[StageCost, ...]
    peak_bytes: int
    census: LayerCensus
    decomposed_attentions: int
    checks: tuple[str, ...]
    bytes: int
    sha256: str
    graph_sha256: str
    weights_sha256: Mapping[str, str]
    cache_key: str
    from_cache: bool = False

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """One entry of `engines` in dlo_artifact.json.

        Args:
            folder: What `file` and `graph` are given relative to; None keeps them.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "file": _path(self.file, folder),
            "graph": _path(self.graph, folder),
            "targets": list(self.targets),
            "profiles": [profile.to_json() for profile in self.profiles],
            "seconds": round(self.seconds, 3),
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "census": self.census.to_json(),
            "checks": list(self.checks),
            "weights_sha256": dict(self.weights_sha256),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], folder: Path | None = None) -> EngineRecord:
        """The inverse of `to_json`; keys that others added to the entry are left out.

        Raises:
            KeyError: A field is missing.
            TypeError: One has another type.
            ValueError: The backend is unknown.
        """
        if values["backend"] not in get_args(BackendName):
            raise ValueError(f"backend is {values['backend']!r}, expected one of {', '.join(get_args(BackendName))}")
        names = {field.name for field in dataclasses.fields(cls)}
        base = folder or Path()
        known = {name: value for name, value in values.items() if name in names} | {
            "file": base / values["file"],
            "graph": base / values["graph"],
            "targets": tuple(values["targets"]),
            "profiles": tuple(map(OptimizationProfile.from_json, values["profiles"])),
            "stages": tuple(StageCost(**stage) for stage in values["stages"]),
            "census": LayerCensus.from_json(values["census"]),
            "checks": tuple(values["checks"]),
        }
        return cls(**known)


def _path(path: Path, folder: Path | None) -> str:
    return str(path) if folder is None else Path(os.path.relpath(path, folder)).as_posix()
