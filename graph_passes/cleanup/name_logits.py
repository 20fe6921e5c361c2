"""Name the output that holds the logits as clients look for it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.checkpoints.interface import LOGITS, is_state_output
from dlo_export.graph_passes.naming import free_interface_names
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class NameLogitsPass(GraphPass):
    """Call the one output that is no part of the cache `logits`.

    Before::

        (…) => (float[batch, sequence, 64] logits_Q4, float[…] present.0.key, …)

    After::

        (…) => (float[batch, sequence, 64] logits, float[…] present.0.key, …)

    Tools that replace the node that computes an output may name the output after the new node, as Olive does where it
    quantises the head. Optional: a graph is left alone where an output is called so already, and where there are
    several, of which nothing says which one it is. Scope: the main graph's outputs; no node changes.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Rename it."""
        others = [value for value in model.graph.outputs if not is_state_output(value.name or "")]
        if len(others) != 1 or others[0].name == LOGITS:
            return False
        free_interface_names(model.graph)  # a value inside the graph may have the name
        others[0].name = LOGITS
        return True
