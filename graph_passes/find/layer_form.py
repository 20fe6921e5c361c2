"""How a decoder layer is written: its attention, its cache, its weights."""

from __future__ import annotations

import collections
import dataclasses

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import subgraphs_of
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.linear_flow import ATTENTION_OPS
from dlo_export.graph_passes.find.projections import Projection
from dlo_export.graph_passes.weights.storage import WeightStorage


@dataclasses.dataclass(frozen=True)
class LayerForm:
    """What was found in a layer, in words.

    Attributes:
        attention: Its operator, or that it is spelled out; what else reads the cached keys, in brackets.
        weights: How most of its matrices are stored, and which of them lie side by side; None where they could not be
            told apart.
        problem: Why they could not: what was expected, and what stands there; None where they could.
    """

    attention: str
    weights: str | None
    problem: str | None


def layer_form(layer: DecoderLayer) -> LayerForm:
    """Describes a layer."""
    try:
        weights, problem = _weights(layer), None
    except GraphPassError as err:
        weights, problem = None, err.message
    return LayerForm(_attention(layer), weights, problem)


def _attention(layer: DecoderLayer) -> str:
    # Behind a lowering, attention stands in branches, for short steps and for long ones.
    branches = (branch for node in layer.attention.nodes for branch in subgraphs_of(node))
    nodes = (*layer.attention.nodes, *(node for branch in branches for node in branch.all_nodes()))
    operators = dict.fromkeys(node.op_type for node in nodes if (node.domain, node.op_type) in ATTENTION_OPS)
    readers = {node.op_type for node in layer.past_key.consumers()} - {"Shape", *operators}
    cache = f" (cache: {', '.join(sorted(readers))})" if readers else ""
    return f"{', '.join(operators) or 'spelled out'}{cache}"


def _weights(layer: DecoderLayer) -> str:
    by_storage: dict[WeightStorage, list[Projection]] = {}
    for projection in layer.projections.values():
        if len(projection.storage.shape) == 2:
            by_storage.setdefault(projection.storage, []).append(projection)
    ((most, _), *others) = collections.Counter(storage.form for storage in by_storage).most_common()
    packed = ["+".join(part.tensor.split(".")[1] for part in parts) for parts in by_storage.values() if len(parts) > 1]
    return "; ".join([most, *(form for form, _ in others), *(f"{names} packed" for names in packed)])
