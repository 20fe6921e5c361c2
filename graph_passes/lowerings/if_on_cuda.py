"""The If lowering on ONNX Runtime's CUDA provider: the pass is the same, its reductions are of numbers."""

from __future__ import annotations

import dataclasses

from dlo_export.graph_passes.lowerings import lower_skip_to_if

# Its ReduceMax takes no bool (onnxruntime-gpu 1.31): of decisions as they are, the CPU would reduce every layer's.
RECORD = dataclasses.replace(
    lower_skip_to_if.RECORD,
    targets=("onnxruntime-cuda",),
    make_pass=lambda workload: lower_skip_to_if.LowerSkipToIfPass(),
)
