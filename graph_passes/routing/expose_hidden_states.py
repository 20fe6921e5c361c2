"""Show the residual stream behind every layer, to find the first one that diverges."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.checkpoints.interface import hidden_name
from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lowering_pass import LoweringPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes


@dataclasses.dataclass(frozen=True)
class ExposeHiddenStatesPass(GraphPass):
    """Add each decoder layer's output to the graph's outputs.

    Before::

        (…) => (logits, …)
        y = Add(h, d)

    After::

        (…) => (logits, …, hidden.3)
        y        = Add(h, d)
        hidden.3 = Identity(y)

    Scope: decoder layers of the main graph. Only for debugging builds, never released.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (LoweringPass,)

    def rewrite(self, model: ir.Model) -> bool:
        """Expose every layer."""
        graph = model.graph
        for layer in find_decoder_layers(graph):
            shape = (*layer.token_dims, layer.hidden_size)
            new = TaggedNodes(self._name, layer.index)
            # An Identity, because an output must have the name that parity looks for and the stream keeps its own.
            dtype = element_type(layer.output)
            name = hidden_name(layer.index)
            graph.outputs.append(new.add("Identity", layer.output, name=name, dtype=dtype, shape=shape))
            graph.extend(new.nodes)
        return True
