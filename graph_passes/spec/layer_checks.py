"""What must hold for the decoder layers of a graph: each check yields its violations, with their places."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from dlo_export.checkpoints.interface import (
    CACHE_PARTS,
    layers_with,
    parse_past,
    parse_present,
    past_active_name,
    past_name,
    present_active_name,
    present_name,
)
from dlo_export.checkpoints.llama_layer import Block
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import (
    captured_values,
    constant_tensor,
    consumed_values,
    node_order,
    nodes_between,
    subgraphs_of,
)
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.masked_blocks import match_masked_blocks
from dlo_export.graph_passes.find.masked_branch import Mismatch
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.spec.provenance import PASS_KEY, ROUTER_ACTIVE, closed_branch, role_values

Layers = Sequence[DecoderLayer]


def incomplete_cache(graph: ir.Graph, layers: Layers) -> Iterator[str]:
    """KV inputs and outputs that are not numbered 0 to L-1, key and value, one pair per decoder layer.

    In whatever order they are listed: whoever runs a graph goes by their names. And states of activity that do not go
    on, or belong to no router.
    """
    sides = ((graph.inputs, past_name, parse_past), (graph.outputs, present_name, parse_present))
    for interface, name_of, parse in sides:
        for part in CACHE_PARTS:
            expected = [name_of(index, part) for index in range(len(layers))]
            names = [value.name or "" for value in interface]
            found = [name for name in names if (state := parse(name)) is not None and state.part == part]
            if sorted(found) != sorted(expected):
                yield f"found {found} as the graph's cache {part}s, expected {expected}"
    past = layers_with((value.name or "" for value in graph.inputs), past_active_name("{i}"))
    present = layers_with((value.name or "" for value in graph.outputs), present_active_name("{i}"))
    if past != present:
        yield f"layers {list(past)} read who was active, layers {list(present)} give it out; expected the same"


def unmasked_routing(graph: ir.Graph, layers: Layers) -> Iterator[str]:
    """Layers that have a router but are not in masked form."""
    routed = find_routers(graph)
    for layer in layers:
        for _, match in match_masked_blocks(layer):
            if layer.index in routed and isinstance(match, Mismatch):
                yield match.reason


def unlowered_routing(
    graph: ir.Graph, layers: Layers, *, pass_name: str, blocks: Collection[Block] = ("self_attn", "mlp")
) -> Iterator[str]:
    """Layers that are masked in these blocks, or have a router and are not closed by a lowering's pass."""
    routed = find_routers(graph)
    for layer in layers:
        # A lowering may leave the form of a mask in what it writes: what it has closed itself is lowered.
        lowered = [block for block in (layer.attention, layer.mlp) if _closed_by(block, pass_name)]
        own = [block for part, block in (("self_attn", layer.attention), ("mlp", layer.mlp)) if part in blocks]
        matches = match_masked_blocks(layer)
        masked = [block for block, match in matches if block in own and not isinstance(match, Mismatch)]
        if not all(block in lowered for block in masked):
            yield f"layer {layer.index} is still masked"
        elif layer.index in routed and not lowered:
            closing = place(layer.mlp.add)
            yield f"layer {layer.index} has a router, but {closing} that closes it is not of {pass_name}"


def _closed_by(block: ResidualBlock, pass_name: str) -> bool:
    return closed_branch(block.add) is not None and block.add.metadata_props.get(PASS_KEY) == pass_name


def _reads_weights(node: ir.Node) -> bool:
    tensors = (constant_tensor(value) for value in node.inputs)
    return any(tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point() for tensor in tensors)


def eager_branches(graph: ir.Graph, layers: Layers) -> Iterator[str]:
    """Blocks in a conditional that would cost time or memory when they are skipped.

    Nodes between the stream and the conditional run always, the router excepted, and what a step that skips needs as
    well: keys and values that it leaves. Weights inside a branch cost several times their memory.
    """
    order, decisions = node_order(graph), role_values(graph, ROUTER_ACTIVE)
    for layer in layers:
        decision = [decisions[layer.index]] if layer.index in decisions else []
        router = nodes_between(order, (layer.input,), decision)
        for block, what in ((layer.attention, "attention"), (layer.mlp, "MLP")):
            conditional = block.conditional
            if conditional is None:
                continue
            skipping = [branch for branch in subgraphs_of(conditional) if branch is not block.add.graph]
            needed = [value for branch in skipping for value in captured_values(branch)]
            always = {*router, *nodes_between(order, (block.stream_in,), needed)}
            # Attention over a cache of fixed size stays outside: what computes with weights must not, but for keys and
            # values that everybody leaves.
            stays = block is layer.attention and layer.present_key not in conditional.outputs
            if stays and layer.past_active is None:
                always.update(nodes_between(order, (block.stream_in,), (layer.present_key, layer.present_value)))
            for node in nodes_between(order, (block.stream_in,), list(consumed_values(conditional)), always):
                if stays and not _reads_weights(node):
                    continue
                yield f"layer {layer.index}: {place(node)} of the {what} is computed outside {place(conditional)}"
            for branch in subgraphs_of(conditional):
                for name in branch.initializers:
                    yield f"layer {layer.index}: initializer '{name}' stands inside {place(conditional)}"
