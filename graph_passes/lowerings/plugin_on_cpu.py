"""The dlo operators on ONNX Runtime's CPU provider: the pass is the same, and takes MLPs of quantised weights too."""

from __future__ import annotations

import dataclasses

from dlo_export.graph_passes.lowerings import lower_skip_to_plugin
from dlo_export.graph_passes.lowerings.lower_skip_to_plugin import LowerSkipToPluginPass
from dlo_export.graph_passes.spec.invariants import lowered_stage
from dlo_export.graph_passes.spec.ops import DOMAIN

# A CPU need not know a shape before the step: there, rows may be gathered, of which a graph has norms fused around.
RECORD = dataclasses.replace(
    lower_skip_to_plugin.RECORD,
    targets=("onnxruntime-cpu",),
    make_pass=lambda workload: LowerSkipToPluginPass(quantised_on_rows=True),
    stage=lowered_stage(LowerSkipToPluginPass.__name__, domains=frozenset({DOMAIN}), blocks=("mlp",)),
    fuses_norms=True,
)
