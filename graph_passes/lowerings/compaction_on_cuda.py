"""Compaction on ONNX Runtime's CUDA provider: the pass is the same, without branches."""

from __future__ import annotations

import dataclasses

from dlo_export.graph_passes.lowerings import lower_skip_to_compaction
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.spec.invariants import lowered_stage

# The host waits for the number of rows already; for a condition it would wait once more in every block, which nobody
# has measured yet.
RECORD = dataclasses.replace(
    lower_skip_to_compaction.RECORD,
    targets=("onnxruntime-cuda",),
    make_pass=lambda workload: LowerSkipToCompactionPass(branches=False),
    stage=lowered_stage(LowerSkipToCompactionPass.__name__),
)
