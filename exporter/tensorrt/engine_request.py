"""What an engine is to be built from and for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import FLOAT32
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.spec.provenance import ROUTER_SCORES, role_values
from dlo_export.runtimes.artefact.engine_record import BackendName, OptimizationProfile
from dlo_export.runtimes.artefact.typed_json import from_json, to_json

# Paths travel to the building process relative to this, whatever folder that starts in.
_ROOT = Path("/")


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
        plugin_operators: Operators of the graph that need plugins.
        plugin_library: libdlo_plugins.so for this backend. Without it a plugin graph is built with the Python twins
            (rtx) or the quick-deploy plugins (tensorrt).
        timeout_s: Seconds after which the build is killed.
        routing: What tokens skip in them.
        routed_layers: Decoder layers whose skip mechanism must be in the network.
        expected_dtypes: Element type, by ONNX's words ("float", "bfloat16", …), of network inputs and
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
    plugin_operators: tuple[str, ...] = ()
    plugin_library: Path | None = None
    timeout_s: float | None = None
    routing: RoutingKind = "mlp"
    routed_layers: tuple[int, ...] = ()
    expected_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    use_cache: bool = True

    def to_json(self) -> str:
        """One line, for the process that builds."""
        return json.dumps(to_json(self, _ROOT))

    @classmethod
    def from_json(cls, text: str) -> EngineRequest:
        """The inverse of `to_json`, its paths absolute."""
        return from_json(cls, json.loads(text), _ROOT)


def intended_dtypes(model: ir.Model) -> dict[str, str]:
    """What `EngineRequest.expected_dtypes` is for a graph of ours: its interface as annotated, its routers in fp32.

    Args:
        model: As it is saved for the build; routers keep their tags through lowerings.
    """
    values = [*model.graph.inputs, *model.graph.outputs]
    routers = role_values(model.graph, ROUTER_SCORES).values()
    return {
        **{value.name or "": value.dtype.name.lower() for value in values if value.dtype is not None},
        **{value.name or "": FLOAT32.onnx for value in routers},
        **{
            operand.name or "": FLOAT32.onnx
            for value in routers
            if (node := value.producer()) is not None and (operand := node.inputs[0]) is not None
        },
    }
