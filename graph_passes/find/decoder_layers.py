"""Find the decoder layers of a causal language model by structure: the residual stream and the KV interface.

Names of nodes and initializers are never looked at, so graphs of any exporter are read alike. Only the names of the
graph's own KV inputs and outputs count, since they are its interface (`checkpoints/interface.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from dlo_export.checkpoints.interface import (
    CacheName,
    CachePart,
    parse_past,
    parse_present,
    past_active_name,
    past_name,
    present_active_name,
    present_name,
)
from dlo_export.graph_passes.errors import DecoderLayersNotFound
from dlo_export.graph_passes.find.data_flow import (
    SHAPE_OPS,
    consumed_values,
    is_op,
    node_order,
    nodes_between,
    subgraphs_of,
)
from dlo_export.graph_passes.find.projections import Projection, find_projections
from dlo_export.graph_passes.find.residual_stream import (
    ResidualBlock,
    embedding_lookup,
    embedding_values,
    residual_blocks,
)
from dlo_export.graph_passes.weights.embedding import embedding_table


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer: x → h = x + attention(x) → y = h + mlp(h).

    Attributes:
        index: Position in the stream, from 0.
        attention: Block that reads and writes the KV cache, the nodes that only lead to `present` included.
        mlp: Block after it.
        past_key: Graph input [batch, kv_heads, past, head_dim]; likewise `past_value`.
        present_key: Graph output [batch, kv_heads, past + sequence, head_dim]; likewise `present_value`.
        past_active: Graph input bool [batch, past] of a layer that tokens skip whole, None in every other layer;
            likewise `present_active`.
        token_dims: The graph's names or numbers for [batch, sequence].
        hidden_size: Width of the residual stream.
    """

    index: int
    attention: ResidualBlock
    mlp: ResidualBlock
    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value
    past_active: ir.Value | None
    present_active: ir.Value | None
    token_dims: tuple[int | str | None, int | str | None]
    hidden_size: int

    @property
    def input(self) -> ir.Value:
        """The residual stream x that enters the layer, [batch, sequence, hidden]."""
        return self.attention.stream_in

    @property
    def output(self) -> ir.Value:
        """The residual stream y that leaves the layer, [batch, sequence, hidden]."""
        return self.mlp.stream_out

    @property
    def cache(self) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Past key and value, present key and value."""
        return self.past_key, self.past_value, self.present_key, self.present_value

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes of the layer in topological order, both additions included, be they inside a conditional."""
        return (*self.attention.nodes, self.attention.add, *self.mlp.nodes, self.mlp.add)

    @functools.cached_property
    def projections(self) -> Mapping[str, Projection]:
        """The layer's weights by role: "q_proj", …, "post_attention_layernorm".

        Raises:
            GraphPassError: A role cannot be told from the structure (fused or quantised projections).
        """
        return find_projections(self.attention, self.mlp, self.present_key, self.present_value, f"layer {self.index}")


def find_decoder_layers(graph: ir.Graph) -> tuple[DecoderLayer, ...]:
    """Find every decoder layer of the main graph, in order.

    Args:
        graph: A decoder with a KV cache, from any exporter; lowered and routed forms of this package too.

    Raises:
        DecoderLayersNotFound: With the place and the reason.
    """
    # Blocks first, by data flow alone; then which of them are attention, by who reads and writes the cache.
    order = node_order(graph)
    blocks = _stream_blocks(graph, order)
    token_dims, hidden_size = _stream_dims(blocks[0].stream_in)
    # A conditional that holds both blocks of a layer gives out the cache of the first.
    owner = {
        node: number
        for number, block in reversed(list(enumerate(blocks)))
        for node in (*_with_inner(block.nodes), block.add, block.conditional)
        if node is not None
    }
    past = _past_owners(graph.inputs, owner)
    present, tails = _present_owners(graph.outputs, owner, order)
    attention_blocks = {number for number, _ in (*past.values(), *present.values())}
    _check_alternation(blocks, attention_blocks)
    active_inputs, active_outputs = ({value.name: value for value in side} for side in (graph.inputs, graph.outputs))
    layers = []
    # Two blocks are a layer. What lies behind attention and only leads to its present values belongs to it too.
    for index, (attention, mlp) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        tail = sorted(tails.get(2 * index, ()), key=order.__getitem__)
        layers.append(
            DecoderLayer(
                index=index,
                attention=dataclasses.replace(attention, nodes=(*attention.nodes, *tail)),
                mlp=mlp,
                past_key=_cache_value(past, index, "key", past_name(index, "key")),
                past_value=_cache_value(past, index, "value", past_name(index, "value")),
                present_key=_cache_value(present, index, "key", present_name(index, "key")),
                present_value=_cache_value(present, index, "value", present_name(index, "value")),
                past_active=active_inputs.get(past_active_name(index)),
                present_active=active_outputs.get(present_active_name(index)),
                token_dims=token_dims,
                hidden_size=hidden_size,
            )
        )
    return tuple(layers)


def _with_inner(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """The nodes, and those in their subgraphs."""
    for node in nodes:
        yield node
        for subgraph in subgraphs_of(node):
            yield from _with_inner(subgraph)


def _stream_blocks(graph: ir.Graph, order: Mapping[ir.Node, int]) -> tuple[ResidualBlock, ...]:
    # Other tables may be looked up by integers too (positions, token types): the stream starts at the one that branches
    # are added to.
    roots = embedding_values(graph)
    streams = [blocks for blocks in (residual_blocks(order, root) for root in roots) if blocks]
    if len(streams) == 1:
        return streams[0]
    if not roots:
        found = "no Gather looks up a constant two-dimensional table by an integer graph input"
    elif not streams:
        found = f"nothing adds a branch back to the embedding output '{roots[0].name}'"
    else:
        found = f"{len(streams)} embeddings start a residual stream of their own"
    raise DecoderLayersNotFound(
        f"find_decoder_layers: no residual stream in graph '{graph.name}': {found}; "
        "expected one token embedding followed by additions of attention and MLP branches.",
        hint="only decoder-only language models that read input_ids are supported",
    )


def _stream_dims(embedding: ir.Value) -> tuple[tuple[int | str | None, int | str | None], int]:
    """[batch, sequence] as the graph input of token ids declares them, and the width of the embedding table."""
    lookup = embedding_lookup(embedding)
    table, tokens = embedding_table(lookup), lookup.inputs[1]
    assert table is not None, "the stream starts at a constant table"
    if tokens is None or tokens.shape is None or len(tokens.shape) != 2:
        raise DecoderLayersNotFound(
            f"find_decoder_layers: token ids '{tokens.name if tokens else ''}' have shape "
            f"{tokens.shape if tokens else None}; expected [batch, sequence]."
        )
    batch, sequence = tokens.shape
    return (_size(batch), _size(sequence)), table.shape[1]


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _past_owners(inputs: Iterable[ir.Value], owner: Mapping[ir.Node, int]) -> dict[CacheName, tuple[int, ir.Value]]:
    """Block that reads each past key or value, by (layer number in the name, part)."""
    found: dict[CacheName, tuple[int, ir.Value]] = {}
    for value in inputs:
        if (name := parse_past(value.name)) is None:
            continue
        # Through nodes that belong to no block (casts, concatenations) to those of the block that uses it.
        readers = _first_owned_readers(value, owner)
        if len(readers) != 1:
            raise DecoderLayersNotFound(
                f"find_decoder_layers: graph input '{value.name}' is read by {len(readers)} residual blocks; "
                "expected exactly one."
            )
        found[name] = (readers.pop(), value)
    return found


def _first_owned_readers(value: ir.Value, owner: Mapping[ir.Node, int]) -> set[int]:
    # What takes only the length of a cache serves the masks of all layers, and says nothing of whose cache it is.
    readers: set[int] = set()
    waiting, seen = [value], {value}
    while waiting:
        for node in waiting.pop().consumers():
            if node in owner:
                readers.add(owner[node])
            elif not is_op(node, *SHAPE_OPS):
                fresh = [output for output in node.outputs if output not in seen]
                waiting.extend(fresh)
                seen.update(fresh)
    return readers


def _present_owners(
    outputs: Iterable[ir.Value], owner: Mapping[ir.Node, int], order: Mapping[ir.Node, int]
) -> tuple[dict[CacheName, tuple[int, ir.Value]], dict[int, set[ir.Node]]]:
    """Block that computes each present key or value, and the nodes behind the blocks that only lead there."""
    owned_values = {output for node in owner for output in node.outputs}
    found: dict[CacheName, tuple[int, ir.Value]] = {}
    tails: dict[int, set[ir.Node]] = {}
    for value in outputs:
        if (name := parse_present(value.name)) is None:
            continue
        # From the value back to the blocks: what lies between is nobody's, and where it ends is the writer.
        tail = nodes_between(order, owned_values, (value,))
        ends = owned_values.intersection((value, *(read for node in tail for read in consumed_values(node))))
        writers = {owner[producer] for end in ends if (producer := end.producer()) is not None}
        if len(writers) != 1:
            raise DecoderLayersNotFound(
                f"find_decoder_layers: graph output '{value.name}' is computed by {len(writers)} residual blocks; "
                "expected exactly one."
            )
        block = writers.pop()
        tails.setdefault(block, set()).update(tail)
        found[name] = (block, value)
    return found, tails


def _check_alternation(blocks: Sequence[ResidualBlock], attention_blocks: set[int]) -> None:
    if not attention_blocks:
        raise DecoderLayersNotFound(
            f"find_decoder_layers: none of the {len(blocks)} residual blocks reads {past_name('{i}', 'key')} or writes "
            f"{present_name('{i}', 'key')}; expected a graph with a KV cache.",
            hint="export it with past key values (optimum: --task text-generation-with-past)",
        )
    # Blocks in another order are another architecture (attention beside MLP, say), which would be cut wrongly.
    for number, block in enumerate(blocks):
        kind = "attention" if number in attention_blocks else "MLP"
        expected = "MLP" if number % 2 else "attention"
        if kind != expected:
            raise DecoderLayersNotFound(
                f"find_decoder_layers: residual block {number} ('{block.stream_in.name}' to "
                f"'{block.stream_out.name}') is an {kind} block by its use of the KV cache; expected {expected}: "
                "each layer adds attention first, then its MLP."
            )
    if len(blocks) % 2:
        raise DecoderLayersNotFound(
            f"find_decoder_layers: the last layer ends after attention, at '{blocks[-1].stream_out.name}'; "
            "expected an MLP block to follow."
        )


def _cache_value(
    found: Mapping[CacheName, tuple[int, ir.Value]], index: int, part: CachePart, expected: str
) -> ir.Value:
    # The number in a name must be the layer's own: passes renumber names, and runners count by them.
    block, value = found.get(CacheName(index, part), (None, None))
    if value is None or block != 2 * index:
        owned = [entry.name for number, entry in found.values() if number == 2 * index]
        raise DecoderLayersNotFound(
            f"find_decoder_layers: layer {index} uses {owned or 'no value'} as its cache; "
            f"expected '{expected}', numbered in the order of the layers."
        )
    return value
