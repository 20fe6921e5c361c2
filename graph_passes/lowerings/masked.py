"""The masked form as it is, and the graph without routers: nothing is lowered."""

from __future__ import annotations

from typing import get_args

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.graph_passes.lowerings.record import ONNXRUNTIME, LoweringRecord
from dlo_export.graph_passes.spec.invariants import INJECTED, ROUTED

RECORD = LoweringRecord(
    name="masked",
    targets=(*ONNXRUNTIME, "tensorrt"),
    make_pass=None,
    stage=ROUTED,
    skips="nothing",
    not_capturable=None,
    reason="the oracle: exact, and computes everything",
    suits=lambda workload: False,
    routing=get_args(RoutingKind),
    fuses_norms=True,
)

DENSE = LoweringRecord(
    name="none",
    targets=(*ONNXRUNTIME, "tensorrt"),
    make_pass=None,
    stage=INJECTED,
    skips="nothing",
    not_capturable=None,
    reason="nothing is routed",
    suits=lambda workload: False,
)
