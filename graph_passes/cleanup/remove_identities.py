"""Remove Identity nodes."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class RemoveIdentitiesPass(GraphPass):
    """Let what reads an Identity read what it passes on.

    Before::

        same = Identity (x)
        y = Neg (same)

    After::

        y = Neg (x)

    Exporters leave them where functions were inlined and weights tied. One that is an output of a graph stays, since
    its name is the output's, and a branch gives out what is computed in it. Optional: a graph without any is left
    alone. Scope: main graph; what its branches read of it too.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Remove every one."""
        found = [node for node in model.graph if is_op(node, "Identity") and not node.outputs[0].is_graph_output()]
        for node in found:
            passed_on = node.inputs[0]
            assert passed_on is not None, "Identity has an input"
            for use in tuple(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, passed_on)
        model.graph.remove(found, safe=True)
        return bool(found)
