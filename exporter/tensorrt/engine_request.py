"""What an engine is to be built from and for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from dlo_export.graph_passes.spec.provenance import role_values

BackendName = Literal["rtx", "tensorrt"]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class OptimizationProfile:
    """Shapes an engine accepts, and those it is tuned for.

    Attributes:
        name: "prefill" or "decode".
        shapes: By input: the least, the optimal and the largest shape.
    """

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def to_json(self) -> dict[str, Any]:
        """As it stands in dlo_artifact.json."""
        return {"name": self.name, "shapes": {name: [*map(list, sizes)] for name, sizes in self.shapes.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OptimizationProfile:
        """The inverse of `to_json`."""
        shapes = {}
        for name, (least, optimal, largest) in values["shapes"].items():
            shapes[name] = (tuple(least), tuple(optimal), tuple(largest))
        return cls(values["name"], shapes)


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """One engine to build.

    Attributes:
        graph: The .onnx file, its external weights beside it.
        output: The engine file to write; it appears whole or not at all.
        backend: Who builds it.
        targets: GPUs it is for, such as "sm89"; empty: every GPU from sm80 on (rtx), or this machine's (tensorrt).
        profiles: In the engine's order; may be empty where all shapes are numbers.
        lowering: What routed layers became: "none", "masked", "compact", "if" or "plugin".
        dtype: "fp16", "bf16" or "fp32", of weights, KV cache and logits; kept in the record.
        plugin_library: libdlo_plugins.so for this backend. Without it a plugin graph is built with the Python twins
            (rtx) or the quick-deploy plugins (tensorrt).
        timeout_s: Seconds after which the build is killed.
        routed_layers: Decoder layers whose skip mechanism must be in the network.
        expected_dtypes: Element type, by onnx_ir's names in lower case ("float", "bfloat16", …), of network inputs and
            outputs and of any other value of the graph.
        use_cache: Take the engine from the engine cache, or put it there.
    """

    graph: Path
    output: Path
    backend: BackendName
    targets: tuple[str, ...] = ()
    profiles: tuple[OptimizationProfile, ...] = ()
    lowering: str = "none"
    dtype: str = "bf16"
    plugin_library: Path | None = None
    timeout_s: float | None = None
    routed_layers: tuple[int, ...] = ()
    expected_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    use_cache: bool = True

    def to_json(self) -> str:
        """One line, for the process that builds."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {
            "graph": str(self.graph.absolute()),
            "output": str(self.output.absolute()),
            "plugin_library": None if self.plugin_library is None else str(self.plugin_library.absolute()),
            "profiles": [profile.to_json() for profile in self.profiles],
            "expected_dtypes": dict(self.expected_dtypes),
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> EngineRequest:
        """The inverse of `to_json`, its paths absolute."""
        values = json.loads(text)
        library = values["plugin_library"]
        values |= {
            "graph": Path(values["graph"]),
            "output": Path(values["output"]),
            "targets": tuple(values["targets"]),
            "profiles": tuple(map(OptimizationProfile.from_json, values["profiles"])),
            "plugin_library": None if library is None else Path(library),
            "routed_layers": tuple(values["routed_layers"]),
        }
        return cls(**values)


def intended_dtypes(model: ir.Model) -> dict[str, str]:
    """What `EngineRequest.expected_dtypes` is for a graph of ours: its interface as annotated, its routers in fp32.

    Args:
        model: As it is saved for the build; routers keep their tags through lowerings.
    """
    values = [*model.graph.inputs, *model.graph.outputs]
    routers = role_values(model.graph, "router_scores").values()
    return {
        **{value.name or "": value.dtype.name.lower() for value in values if value.dtype is not None},
        **{value.name or "": ir.DataType.FLOAT.name.lower() for value in routers},
        **{
            operand.name or "": ir.DataType.FLOAT.name.lower()
            for value in routers
            if (node := value.producer()) is not None and (operand := node.inputs[0]) is not None
        },
    }
