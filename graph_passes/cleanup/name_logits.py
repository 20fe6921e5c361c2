"""Name the output that holds the logits as clients look for it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.checkpoints.interface import LOGITS, is_state_output
from dlo_export.graph_passes.find.residual_stream import embedding_lookup, embedding_values
from dlo_export.graph_passes.naming import free_interface_names
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.weights.embedding import embedding_table


@dataclasses.dataclass(frozen=True)
class NameLogitsPass(GraphPass):
    """Call the one output that has a number for each token of the vocabulary `logits`.

    Before::

        (…) => (float[batch, sequence, 64] logits_Q4, float[…] present.0.key, …)    # 64 rows in the embedding

    After::

        (…) => (float[batch, sequence, 64] logits, float[…] present.0.key, …)

    Tools that replace the node that computes an output may name the output after the new node, as Olive does where it
    quantises the head. Optional: a graph is left alone where an output is called so already, or where none or several
    may be it. Scope: the main graph's outputs; no node changes.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Rename it."""
        outputs = [value for value in model.graph.outputs if not is_state_output(value.name or "")]
        if any(value.name == LOGITS for value in outputs):
            return False
        tables = [embedding_table(embedding_lookup(value)) for value in embedding_values(model.graph)]
        vocabularies = {table.shape[0] for table in tables if table is not None}
        found = [value for value in outputs if value.shape is not None and value.shape.rank() == 3]
        found = [value for value in found if value.shape is not None and value.shape[2] in vocabularies]
        if len(found) != 1:
            return False
        free_interface_names(model.graph)  # a value inside the graph may have the name
        found[0].name = LOGITS
        return True
