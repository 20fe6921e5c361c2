"""Append to the KV cache with Concat, in front of an attention without a cache of its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.cache.attention_cache import (
    CachedAttention,
    attend,
    cached_attentions,
    heads_first,
)
from dlo_export.graph_passes.depth.inject_layers import InjectLayersPass
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import TaggedNodes


@dataclasses.dataclass(frozen=True)
class GrowCacheOutsideAttentionPass(GraphPass):
    """Take past and present out of Attention, whose cache operands TensorRT does not build; the interface stays.

    Before::

        y, pk, pv = Attention(q, k, v, bias, past_key, past_value)

    After::

        pk = Concat(past_key, heads(k), axis=2)             # and pv
        y  = tokens(Attention(heads(q), pk, pv, bias))

    Scope: main graph. Source: ONNX Attention-23.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (InjectLayersPass, RouteLayersPass)
    nodes_from: ClassVar[Border | None] = "injected"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every attention.

        Raises:
            GraphPassError: There is none with a growing cache, or one cannot be rewritten; with all reasons.
        """
        graph = model.graph
        for attention in cached_attentions(graph, self._name):
            _rewrite(graph, attention)
        remove_unused(graph)
        return True


def _rewrite(graph: ir.Graph, attention: CachedAttention) -> None:
    new = TaggedNodes(GrowCacheOutsideAttentionPass.__name__, attention.layer)
    present = []
    # Key and value are operands 1 and 2; three further on are their pasts, and as outputs they have the same numbers.
    for index, part in ((1, "key"), (2, "value")):
        past, name = attention.operand(index + 3), f"{attention.name}.{part}_cache"
        shape = attention.node.outputs[index].shape
        update = heads_first(graph, new, attention, index, part)
        present.append(new.add("Concat", past, update, name=name, dtype=attention.dtype, shape=shape, axis=2))
    attend(graph, new, attention, (present[0], present[1]), attention.operand(3))
