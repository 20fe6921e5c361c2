"""What a lowering is to everybody else: one record, written beside its pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import onnx_ir as ir

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.llama_layer import Block
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.spec.invariants import StageSpec
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE

Target = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"]
PROVIDER_TARGETS: Mapping[ProviderOption, Target] = {"cpu": "onnxruntime-cpu", "cuda": "onnxruntime-cuda"}
"""What a graph for one of ONNX Runtime's providers is lowered for."""
ONNXRUNTIME: tuple[Target, ...] = tuple(PROVIDER_TARGETS.values())


ROWS_READ_BACK = "the number of active tokens is read back by the host"
"""Why steps that run on gathered rows cannot be captured."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a graph is made to run: what a lowering's settings and the choice of one depend on.

    Attributes:
        phase: "prefill" and "decode" where a graph runs one of them only.
        max_batch: Sequences per step at most.
        max_sequence: Tokens per sequence and step at most.
        plugins_at_hand: Whether kernels of the dlo operators can be had.
        routing: What tokens skip.
    """

    phase: Literal["both", "prefill", "decode"] = "both"
    max_batch: int = 4
    max_sequence: int = 512
    plugins_at_hand: bool = False
    routing: RoutingKind = "mlp"


@dataclasses.dataclass(frozen=True)
class LoweringRecord:
    """One lowering on the targets it serves. A name may have a record per target, never two for one target.

    Attributes:
        name: What `--lowering` calls it.
        targets: Which runtimes run its graphs.
        make_pass: The pass, set for a workload; None where the masked form stays as it is.
        stage: What is legal in the graph afterwards.
        skips: What a skipped token saves of the MLP, or of the layer: nothing, its own part ("tokens"), or all of a
            step's where no token of it is active ("steps").
        not_capturable: Why a CUDA graph cannot capture its steps; None where it can, as long as no rows are gathered.
        reason: Why `auto` chooses it, for reports.
        suits: Whether `auto` may choose it for a workload.
        routing: What tokens may skip in the graphs that it takes.
        blocks: Those of a layer that it makes skip; others stay masked.
        fuses_norms: Whether norms around a routed block are fused with their additions, where a graph had them so.
        multiplies_by_codes: Whether a routed MLP's weights that nodes dequantise become part of the products.
        domains: Operator domains besides ONNX's own that its graphs use.
        operators: Operators it writes that a runtime may lack for some types; one of another domain as
            "dlo::SkipGateUp".
        tensorrt_layers: TensorRT's types of layers that carry the skip, all of which a routed layer's network has.
        tensorrt_start: The one of them from which on TensorRT runs lazily; None where no other layer holds the MLP.
    """

    name: str
    targets: tuple[Target, ...]
    make_pass: Callable[[Workload], LoweringPass] | None
    stage: StageSpec
    skips: Literal["nothing", "tokens", "steps"]
    not_capturable: str | None
    reason: str
    suits: Callable[[Workload], bool]
    routing: tuple[RoutingKind, ...] = ("mlp",)
    blocks: tuple[Block, ...] = ("self_attn", "mlp")
    fuses_norms: bool = False
    multiplies_by_codes: bool = False
    domains: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    tensorrt_layers: frozenset[str] = frozenset()
    tensorrt_start: str | None = None

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can capture its steps."""
        return self.not_capturable is None

    def why_not_captured(self, graph: ir.Graph) -> str | None:
        """Why a CUDA graph cannot capture the steps of a graph of it; None where it can."""
        gathers = any(is_op(node, GATHER_ACTIVE.name, domain=DOMAIN) for node in graph.all_nodes())
        return ROWS_READ_BACK if self.not_capturable is None and gathers else self.not_capturable
