"""Have attention in a branch of compaction's If run otherwise where a step is long, and some of its tokens skip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.interface import CACHE_PARTS, INPUT_IDS
from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.branches import Branch, conditional_node
from dlo_export.graph_passes.find.data_flow import is_op, producer_of, subgraphs_of
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import PASS_KEY, TaggedNodes, layer_of, shared_constant, shared_node

LEAST = 128
"""Tokens of a sequence in a step that is long: a shorter one pays more for choosing than it saves."""


@dataclasses.dataclass(frozen=True, eq=False)
class AttendedRows:
    """Attention in a branch of an If, whose result is read for active tokens alone.

    Attributes:
        holder: The If, in the main graph.
        attention: It; gives out what it attended, then the cache.
        gather: The GatherND that reads active tokens' rows of it.
        active: Who is active, bool [batch, sequence].
    """

    holder: ir.Node
    attention: ir.Node
    gather: ir.Node
    active: ir.Value

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer."""
        return layer_of(self.gather)

    @property
    def path(self) -> str:
        """Prefix of the names of new nodes."""
        return f"{self.gather.name}.queries"

    @property
    def index(self) -> ir.Value:
        """Of active tokens, int64 [n, 2]."""
        index = self.gather.inputs[1]
        assert index is not None, "who is active was found by it"
        return index


def attended_rows(graph: ir.Graph, takes: Callable[[ir.Node], bool]) -> list[AttendedRows]:
    """All of a graph, in order.

    Args:
        graph: A decoder.
        takes: Whether a node is attention of the kind that is looked for.
    """
    if not any(value.name == INPUT_IDS for value in graph.inputs):
        return []
    nodes = [(holder, node) for holder in graph for branch in subgraphs_of(holder) for node in branch]
    found = (_rows_of(holder, node) for holder, node in nodes if takes(node))
    return [rows for rows in found if rows is not None]


def _rows_of(holder: ir.Node, attention: ir.Node) -> AttendedRows | None:
    uses = tuple(attention.outputs[0].uses())
    gather = uses[0].node if len(uses) == 1 and uses[0].idx == 0 else None
    if not is_op(gather, "GatherND") or PASS_KEY not in gather.metadata_props:
        return None
    active = _behind_index(gather.inputs[1])
    return None if active is None else AttendedRows(holder, attention, gather, active)


def _behind_index(index: ir.Value | None) -> ir.Value | None:
    """Who is active, bool [batch, sequence], of compaction's index."""
    transpose = producer_of(index)
    if not is_op(transpose, "Transpose") or transpose.inputs[0] is None:
        return None
    nonzero = transpose.inputs[0].producer()
    return nonzero.inputs[0] if is_op(nonzero, "NonZero") else None


def told_in_branch(attention: ir.Node, mask: int) -> list[ir.Node]:
    """What tells an attention whom it must not see, beside it in its branch, in order; empty where all are seen.

    Nothing else reads it.

    Args:
        attention: In a branch.
        mask: Number of its input that says so.
    """
    found: list[ir.Node] = []
    node = producer_of(attention.inputs[mask]) if len(attention.inputs) > mask else None
    while node is not None and node.graph is attention.graph and len(node.outputs[0].uses()) == 1:
        found.insert(0, node)
        node = producer_of(node.inputs[0])
    return found


@dataclasses.dataclass(frozen=True)
class LongStep:
    """What a branch for a long step is made of.

    Attributes:
        sequence: Tokens of a sequence, int64 [1].
        flags: Who is active, float32 [batch, sequence].
        size: Most active tokens of a sequence, int64 [1].
    """

    sequence: ir.Value
    flags: ir.Value
    size: ir.Value


def choose_in_long_steps(
    graph: ir.Graph,
    rows: AttendedRows,
    some: Callable[[LongStep], Branch],
    *,
    told: Sequence[ir.Node] = (),
    least: int,
    made_by: str,
) -> None:
    """Puts attention into the branches of two Ifs, and another form of it into one.

    Args:
        graph: The main graph; needs sorting afterwards.
        rows: What is rewritten.
        some: Makes the other form, for a long step in which every sequence skips something: gives active tokens' rows
            and the cache.
        told: Nodes in front of attention that nothing else reads, and go with it.
        least: Tokens of a sequence in a step that is long.
        made_by: Name of the pass.
    """
    branch, path, gather = rows.gather.graph, rows.path, rows.gather
    assert isinstance(branch, ir.Graph), "a branch of the holder"
    new = TaggedNodes(made_by, rows.layer)
    sequence, is_long = _length(graph, rows.holder, least, made_by)

    # A long step is as long as the sequence with most active tokens, unless that skips nothing.
    flags, size = most_active(graph, new, rows.active, path)
    fewer = new.add("Less", size, sequence, name=f"{path}.fewer", dtype=ir.DataType.BOOL, shape=(1,))
    asked = (*told, rows.attention, gather)
    given = (gather.outputs[0], *rows.attention.outputs[1:])
    other, chosen = some(LongStep(sequence, flags, size)), _alike(given, f"{path}.chosen")
    every = copies(asked, f"{path}.every", new.tags)
    everything = [every[-1].outputs[0], *every[-2].outputs[1:]]
    choose = conditional_node(branch, f"{path}.chosen", fewer, other, (every, everything), chosen, new.tags)

    # What the outer If gives out takes the place of rows and cache; the branches' own values get other names.
    results = _alike(given, "")
    for old, result in zip(given, results, strict=True):
        replace_value(old, result)
        old.name = f"{result.name}.all_queries"
    long, short = ([*new.nodes, choose], chosen), (asked, given)
    branch.append(conditional_node(branch, str(gather.name), is_long, long, short, results, new.tags))


def most_active(graph: ir.Graph, new: TaggedNodes, active: ir.Value, path: str) -> tuple[ir.Value, ir.Value]:
    """Who is active, float32 [batch, tokens], and how many are in the sequence with most of them, int64 [1].

    Args:
        graph: The main graph.
        new: Takes the nodes.
        active: bool [batch, tokens].
        path: Prefix of their names.
    """
    float32, int64 = ir.DataType.FLOAT, ir.DataType.INT64
    axis = shared_constant(graph, f"{ROUTERS}.second_axis", np.array([1], np.int64))
    flags = new.add("Cast", active, name=f"{path}.flags", dtype=float32, shape=active.shape, to=int(float32))
    counts = new.add("ReduceSum", flags, axis, name=f"{path}.counts", dtype=float32, shape=None, keepdims=0)
    most = new.add("ReduceMax", counts, name=f"{path}.most", dtype=float32, shape=(1,), keepdims=1)
    return flags, new.add("Cast", most, name=f"{path}.size", dtype=int64, shape=(1,), to=int(int64))


def _length(graph: ir.Graph, before: ir.Node, least: int, made_by: str) -> tuple[ir.Value, ir.Value]:
    """Tokens of a sequence, int64 [1], and whether those are many, bool [1]: once per step."""
    tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
    tags, int64, name = TaggedNodes(made_by, None).tags, ir.DataType.INT64, f"{ROUTERS}.sequence"
    sequence = shared_node(
        graph, "Shape", tokens, name=name, tags=tags, dtype=int64, shape=(1,), before=before, start=1, end=2
    )
    bound = shared_constant(graph, f"{ROUTERS}.long_sequence", np.array(least, np.int64))
    is_long = shared_node(
        graph,
        "GreaterOrEqual",
        sequence,
        bound,
        name=f"{ROUTERS}.is_long",
        tags=tags,
        dtype=ir.DataType.BOOL,
        shape=(1,),
        before=before,
    )
    return sequence, is_long


def copies(nodes: Sequence[ir.Node], path: str, tags: Mapping[str, str]) -> list[ir.Node]:
    """Nodes once more, for another branch: what they read of each other, they read of the copies.

    Args:
        nodes: In order, each of another operator.
        path: Prefix of the copies' names.
        tags: Their metadata.
    """
    made: list[ir.Node] = []
    of: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        copy = ir.node(
            node.op_type,
            [value if value is None else of.get(value, value) for value in node.inputs],
            dict(node.attributes),
            domain=node.domain,
            num_outputs=len(node.outputs),
            name=f"{path}.{node.op_type.lower()}",
            metadata_props=dict(tags),
        )
        for new, old, part in zip(copy.outputs, node.outputs, ("output", *CACHE_PARTS), strict=False):
            new.name, new.type, new.shape = f"{copy.name}.{part}", old.type, old.shape
            of[old] = new
        made.append(copy)
    return made


def _alike(values: Sequence[ir.Value], path: str) -> list[ir.Value]:
    """Values of the same types and shapes; without a path, without names."""
    names = (f"{path}.{part}" if path else None for part in ("rows", *CACHE_PARTS))
    return [ir.Value(name=name, type=value.type, shape=value.shape) for name, value in zip(names, values, strict=True)]
