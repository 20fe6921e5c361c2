"""Show the residual stream behind every layer, to find the first one that diverges."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes


@dataclasses.dataclass(frozen=True)
class ExposeHiddenStatesPass(ir.passes.InPlacePass):
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

    runs_after: ClassVar[tuple[type[ir.passes.PassBase], ...]] = (LowerSkipToCompactionPass, LowerSkipToIfPass)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expose every layer that is not exposed yet."""
        graph = model.graph
        exposed = {value.name for value in graph.outputs}
        hidden = [layer for layer in find_decoder_layers(graph) if f"hidden.{layer.index}" not in exposed]
        for layer in hidden:
            shape = (*layer.token_dims, layer.hidden_size)
            new = TaggedNodes(type(self).__name__, layer.index)
            dtype = element_type(layer.output)
            graph.outputs.append(
                new.add("Identity", layer.output, name=f"hidden.{layer.index}", dtype=dtype, shape=shape)
            )
            graph.extend(new.nodes)
        return ir.passes.PassResult(model, modified=bool(hidden))
