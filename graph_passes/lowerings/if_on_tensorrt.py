"""The If lowering on TensorRT: the pass is the same, what its builder takes is not."""

from __future__ import annotations

import dataclasses

from dlo_export.graph_passes.lowerings import lower_skip_to_if

# Attention that is skipped without its MLP makes TensorRT-RTX 1.7 crash while it builds a 16-bit engine (not a 32-bit
# one): `compact` is what tokens skip it with there.
RECORD = dataclasses.replace(
    lower_skip_to_if.RECORD,
    targets=("tensorrt",),
    make_pass=lambda workload: lower_skip_to_if.LowerSkipToIfPass(),  # it reduces numbers only
    routing=("mlp", "layer"),
    multiplies_by_codes=False,
    tensorrt_layers=frozenset({"CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT"}),
    tensorrt_start="CONDITIONAL_INPUT",
)
