"""What must hold for a graph: each check yields its violations, with their places."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator

import onnx_ir as ir

from graph_passes.data_flow import consumed_values, is_op
from graph_passes.decoder_layers import find_decoder_layers
from graph_passes.errors import DecoderLayersNotFound, place
from graph_passes.masked_mlp import MaskedMlp, Mismatch, match_masked_mlp
from graph_passes.provenance import role_values

_CACHE = re.compile(r"(past_key_values|present)\.(\d+)\.(key|value)")


def unused_inputs(graph: ir.Graph) -> Iterator[str]:
    """Graph inputs that nothing reads."""
    for value in graph.inputs:
        if not value.uses() and not value.is_graph_output():
            yield f"graph input '{value.name}' has no consumer"


def broken_values(graph: ir.Graph) -> Iterator[str]:
    """Values that come from nowhere or too late, names given twice, initializers without contents or readers."""
    known = {*graph.inputs, *graph.initializers.values()}
    names = collections.Counter(value.name for value in known)
    for node in graph:
        for value in consumed_values(node):
            if value not in known:
                yield f"{place(node)} reads '{value.name}' before it is computed"
        known.update(node.outputs)
        names.update(output.name for output in node.outputs if output.name)
    for value in graph.outputs:
        if value not in known:
            yield f"graph output '{value.name}' is not computed"
    yield from (f"name '{name}' is given to {count} values" for name, count in names.items() if count > 1)
    for name, value in graph.initializers.items():
        if value.const_value is None:
            yield f"initializer '{name}' has no contents"
        if not value.uses() and not value.is_graph_output():
            yield f"initializer '{name}' has no consumer"


def foreign_branch_outputs(graph: ir.Graph) -> Iterator[str]:
    """Outputs of subgraphs that are computed outside of them: runtimes reject those."""
    for subgraph in graph.subgraphs():
        inner = {output for node in subgraph for output in node.outputs} | set(subgraph.initializers.values())
        for value in subgraph.outputs:
            if value not in inner:
                yield f"output '{value.name}' of subgraph '{subgraph.name}' is not computed inside it"


def incomplete_cache(graph: ir.Graph) -> Iterator[str]:
    """KV inputs and outputs that are not numbered 0 to L-1, key and value, in order, one pair per decoder layer."""
    try:
        depth = len(find_decoder_layers(graph))
    except DecoderLayersNotFound as error:
        yield str(error)
        return
    for prefix, interface in (("past_key_values", graph.inputs), ("present", graph.outputs)):
        for part in ("key", "value"):
            expected = [f"{prefix}.{index}.{part}" for index in range(depth)]
            matches = [_CACHE.fullmatch(value.name or "") for value in interface]
            found = [match[0] for match in matches if match is not None and match[3] == part]
            if found != expected:
                yield f"found {found} as the graph's {prefix} {part}s, expected {expected} in this order"


def unmasked_routing(graph: ir.Graph) -> Iterator[str]:
    """Layers that have a router but are not in masked form."""
    routed = role_values(graph, "router_scores")
    for layer in find_decoder_layers(graph):
        match = match_masked_mlp(layer)
        if layer.index in routed and isinstance(match, Mismatch):
            yield match.reason


def uncompacted_routing(graph: ir.Graph) -> Iterator[str]:
    """Layers that have a router but still run their MLP for all tokens."""
    routed = role_values(graph, "router_scores")
    for layer in find_decoder_layers(graph):
        if isinstance(match_masked_mlp(layer), MaskedMlp):
            yield f"layer {layer.index} is still masked"
        elif layer.index in routed and not is_op(layer.mlp.add, "ScatterND"):
            yield f"layer {layer.index} has a router but {place(layer.mlp.add)} adds its MLP branch for all tokens"
