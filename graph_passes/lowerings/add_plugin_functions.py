"""Give TensorRT's plugins bodies in standard operators, for runtimes that have none."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS, reference_function
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class AddPluginFunctionsPass(GraphPass):
    """Add a model-local function for every plugin of the graph (`PLUGIN_OPS`); the nodes stay as they are.

    Before::

        y = dlo::SkipDown(gated, factor, w, h)

    After::

        y = dlo::SkipDown(gated, factor, w, h)               # as before, and in the model:
        dlo::SkipDown(gated, scale, down_weight, residual) => (output) { … }

    Optional: a graph without plugins is left alone. Scope: functions of the model. Source: ONNX IR, FunctionProto.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Add what is missing."""
        used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN} & PLUGIN_OPS.keys()
        for name in sorted(used):
            function = reference_function(PLUGIN_OPS[name])
            model.functions[function.identifier()] = function
        return bool(used)
