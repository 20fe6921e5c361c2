"""Norms around a block that an If skips: fused with the additions in its branches, and apart again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.skip_norms import (
    NORM,
    SUM,
    fused_node,
    is_fused,
    is_residual_addition,
    new_addition,
    new_norm,
    only_norm_of,
)
from dlo_export.graph_passes.find.data_flow import constant_tensor, element_type, is_op, subgraphs_of
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.spec.provenance import PASS_KEY


@dataclasses.dataclass(frozen=True, eq=False)
class _SkippedBlock:
    """An If that runs a block or passes the stream on, and what stands around it.

    Attributes:
        add: In front of it, the addition that makes the stream h it reads.
        norm: In the branch that runs the block, the norm of h.
        last: There, the addition that closes the block.
        skip: In the other branch, the Identity of h.
        next_norm: Behind the If, the norm of the stream.
    """

    add: ir.Node
    norm: ir.Node
    last: ir.Node
    skip: ir.Node
    next_norm: ir.Node


def join_in_branches(conditional: ir.Node, tags: Mapping[str, str]) -> bool:
    """Moves the addition in front of a skipped block and the norm behind it into the branches of its If, fused.

    Before::

        h = Add(x, a)
        y = If(any) <then = { n = Norm(h, w); …; z = Add(h, branch) => z }, else = { s = Identity(h) => s }>
        m = Norm(y, v)

    After, with F for SkipSimplifiedLayerNormalization::

        m, y = If(any) <
          then = { n, _, _, h = F(x, a, w); …; m', _, _, z = F(h, branch, v) => m', z },
          else = { m', _, _, s = F(x, a, v) => m', s }
        >

    So a step that runs the block runs what the graph ran before it was routed, and one that skips it a single operator.

    Args:
        conditional: An If of the main graph.
        tags: Metadata of new nodes.

    Returns:
        Whether the If is of that form. Nobody else may read h, which is not computed outside any more.
    """
    block = _skipped_block(conditional)
    graph = conditional.graph
    if block is None or graph is None:
        return False
    then, otherwise, stream = block.last.graph, block.skip.graph, block.add.outputs[0]
    assert isinstance(then, ir.Graph), "a branch"
    assert isinstance(otherwise, ir.Graph), "a branch"

    # The branch that runs the block makes the stream itself. The metadata of the addition that closes the block stay
    # with it: by them the layer is found when all this comes apart again.
    first = fused_node(block.add, block.norm, tags)
    then.insert_before(block.norm, first)
    replace_value(block.norm.outputs[0], first.outputs[NORM])
    last = fused_node(block.last, block.next_norm, block.last.metadata_props)
    last.replace_input_with(list(block.last.inputs).index(stream), first.outputs[SUM])
    then.insert_before(block.last, last)
    # The other branch joins the same two with the norm behind: nobody there asks for the norm in front of the block.
    skip = fused_node(block.add, block.next_norm, block.skip.metadata_props, block.skip.outputs[0])
    otherwise.insert_before(block.skip, skip)
    for branch, old, new in ((then, block.last, last), (otherwise, block.skip, skip)):
        new.name, new.outputs[NORM].name = old.name, f"{old.outputs[0].name}.norm"
        replace_value(old.outputs[0], new.outputs[SUM])
        branch.outputs[:] = [new.outputs[NORM], new.outputs[SUM]]
    then.remove([block.norm, block.last], safe=True)
    otherwise.remove(block.skip, safe=True)
    replace_value(stream, first.outputs[SUM])

    # The If gives both. Where nobody reads the stream itself any more, behind the last layer, it gives the norm alone.
    result = conditional.outputs[0]
    joined = _with_outputs(conditional, [last.outputs[NORM], last.outputs[SUM]])
    replace_value(block.next_norm.outputs[0], joined.outputs[0])
    graph.remove(block.next_norm, safe=True)
    replace_value(result, joined.outputs[1])
    graph.remove([conditional, block.add], safe=True)
    if not joined.outputs[1].uses() and not joined.outputs[1].is_graph_output():
        joined.resize_outputs(1)
        for branch in (then, otherwise):
            branch.outputs.pop().name = ""
    return True


def add_behind_branches(conditional: ir.Node, tags: Mapping[str, str]) -> bool:
    """Moves the addition that closes a skipped block out of its If, where the norm behind can be fused with it.

    Before, where no norm of x stands in the branch, since attention between the two runs for all tokens::

        h = If(any) <then = { …; z = Add(x, branch) => z }, else = { s = Identity(x) => s }>
        m = Norm(h, v)

    After::

        b = If(any) <then = { … => branch }, else = { s = Identity(zeros) => s }>
        h = Add(x, b)
        m = Norm(h, v)

    Args:
        conditional: An If of the main graph.
        tags: Metadata of new nodes.

    Returns:
        Whether the If is of that form, and one norm reads h.
    """
    found, graph = _skipped_addition(conditional), conditional.graph
    if found is None or not isinstance(graph, ir.Graph):
        return False
    stream, last, skip, norm = found
    weight, dtype, (branch,) = constant_tensor(norm.inputs[1]), element_type(stream), _others(last, stream)
    made = branch.producer()
    if weight is None or dtype is None or made is None or made.graph is not last.graph:
        return False
    then, otherwise, total = last.graph, skip.graph, conditional.outputs[0]
    assert isinstance(then, ir.Graph), "a branch"
    assert isinstance(otherwise, ir.Graph), "a branch"
    # Each branch gives what is added: the block's result, or the zeros that all layers of the lowering share.
    zeros = token_zeros(graph, conditional.metadata_props[PASS_KEY], int(weight.shape.numpy()[-1]), dtype, conditional)
    nothing = _identity(skip, zeros)
    otherwise.insert_before(skip, nothing)
    nothing.outputs[0].name, skip.outputs[0].name = skip.outputs[0].name, None
    then.outputs[:], otherwise.outputs[:] = [branch], [nothing.outputs[0]]
    then.remove(last, safe=True)
    otherwise.remove(skip, safe=True)
    # What closes the block stands behind the If, as it does where nothing is skipped.
    whole = ir.node("Add", [stream, total], name=last.name, metadata_props=dict(tags))
    whole.outputs[0].type, whole.outputs[0].shape = total.type, total.shape
    graph.insert_after(conditional, whole)
    replace_value(total, whole.outputs[0])
    whole.replace_input_with(1, total)
    total.name = f"{whole.outputs[0].name}.added"
    return True


def split_in_branches(conditional: ir.Node, opset: int, tags: Mapping[str, str]) -> bool:
    """Undoes `join_in_branches`.

    Args:
        conditional: An If of the main graph.
        opset: Of the graph.
        tags: Metadata of new nodes.

    Returns:
        Whether there was something to undo.
    """
    found, graph = _joined_block(conditional), conditional.graph
    if found is None or graph is None:
        return False
    first, last, skip = found
    then, otherwise = last.graph, skip.graph
    assert isinstance(then, ir.Graph), "a branch"
    assert isinstance(otherwise, ir.Graph), "a branch"

    # The stream stands in front of the If again, for both branches; its norm serves the block alone.
    add = new_addition(first, tags)
    norm = new_norm(first, add.outputs[0], opset, tags)
    graph.insert_before(conditional, add)
    then.insert_before(first, norm)
    replace_value(first.outputs[NORM], norm.outputs[0])
    replace_value(first.outputs[SUM], add.outputs[0])
    # Behind the If, the next norm reads the stream by itself. Behind the last layer nobody else reads it.
    single = _with_outputs(conditional, [add.outputs[0]])
    single.outputs[0].name = f"{conditional.name}/output_0"
    after = new_norm(last, single.outputs[0], opset, tags)
    graph.insert_before(conditional, after)
    replace_value(conditional.outputs[0], after.outputs[0])
    for total in conditional.outputs[1:]:
        replace_value(total, single.outputs[0])
    graph.remove(conditional, safe=True)
    # What closes the block is an addition as the lowering wrote it, and skipping is passing the stream on.
    closing, passing = new_addition(last, last.metadata_props), _identity(skip, add.outputs[0])
    for branch, old, new in ((then, last, closing), (otherwise, skip, passing)):
        branch.insert_before(old, new)
        name = (old.outputs[NORM].name or "").removesuffix(".norm")
        branch.outputs[:] = [new.outputs[0]]
        for total in old.outputs[SUM:]:
            replace_value(total, new.outputs[0])
        new.name, new.outputs[0].name = old.name, name
    then.remove([first, last], safe=True)
    otherwise.remove(skip, safe=True)
    return True


def _branch_ends(conditional: ir.Node) -> tuple[ir.Node, ir.Node, ir.Value] | None:
    """Where an If that runs a block or skips it ends: the Identity, the addition, and the stream that is passed on."""
    branches = list(subgraphs_of(conditional))
    if len(conditional.outputs) != 1 or len(branches) != 2:
        return None
    ends = [branch.outputs[0].producer() for branch in branches]
    skip = next((end for end in ends if is_op(end, "Identity")), None)
    last = next((end for end in ends if end is not None and is_residual_addition(end)), None)
    stream = None if skip is None else skip.inputs[0]
    return None if skip is None or last is None or stream is None else (skip, last, stream)


def _skipped_block(conditional: ir.Node) -> _SkippedBlock | None:
    ends = _branch_ends(conditional)
    if ends is None:
        return None
    skip, last, stream = ends
    add, norm = stream.producer(), only_norm_of(stream, last.graph)
    next_norm = only_norm_of(conditional.outputs[0], conditional.graph)
    if add is None or norm is None or next_norm is None or not is_residual_addition(add):
        return None
    alone = set(stream.consumers()) == {norm, last, skip} and not stream.is_graph_output()
    branches = list(subgraphs_of(conditional))
    plain = len(skip.graph or ()) == 1 and last.graph in branches and list(last.inputs).count(stream) == 1
    return (
        _SkippedBlock(add, norm, last, skip, next_norm) if alone and plain and add.graph is conditional.graph else None
    )


def _skipped_addition(conditional: ir.Node) -> tuple[ir.Value, ir.Node, ir.Node, ir.Node] | None:
    """The stream that an If adds to or passes on, the addition, the Identity, and the norm behind."""
    ends, norm = _branch_ends(conditional), only_norm_of(conditional.outputs[0], conditional.graph)
    if ends is None or norm is None:
        return None
    (skip, last, stream), branches = ends, list(subgraphs_of(conditional))
    if last.graph not in branches or skip.graph not in branches:
        return None
    alone = len(skip.graph) == 1 and len(last.outputs[0].uses()) == 0
    return (stream, last, skip, norm) if alone and len(_others(last, stream)) == 1 else None


def _others(add: ir.Node, stream: ir.Value) -> list[ir.Value]:
    return [value for value in add.inputs if value is not None and value is not stream]


def _joined_block(conditional: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """First and last fused node of the branch that runs a block, and that of the other one."""
    branches = list(subgraphs_of(conditional))
    ends = [branch.outputs[0].producer() for branch in branches]
    if len(branches) != 2 or not all(is_fused(end) for end in ends):
        return None
    skip = next((end for end, branch in zip(ends, branches, strict=True) if len(branch) == 1), None)
    last = next((end for end in ends if end is not skip), None)
    if skip is None or last is None or last.inputs[0] is None:
        return None
    firsts = [value.producer() for value in last.inputs[:2] if value is not None]
    first = next((node for node in firsts if is_fused(node)), None)
    same = first is not None and list(first.inputs[:2]) == list(skip.inputs[:2]) and first.graph is last.graph
    return (first, last, skip) if same and first is not None else None


def _with_outputs(conditional: ir.Node, like: list[ir.Value]) -> ir.Node:
    """An If of the same branches in front of this one, with outputs typed as others are, without names."""
    new = ir.node(
        "If",
        conditional.inputs,
        {name: attribute.as_graph() for name, attribute in conditional.attributes.items()},
        num_outputs=len(like),
        name=conditional.name,
        metadata_props=dict(conditional.metadata_props),
    )
    for output, old in zip(new.outputs, like, strict=True):
        output.type, output.shape = old.type, old.shape
    assert conditional.graph is not None, "it stands in the main graph"
    conditional.graph.insert_before(conditional, new)
    return new


def _identity(skip: ir.Node, stream: ir.Value) -> ir.Node:
    node = ir.node("Identity", [stream], name=skip.name, metadata_props=dict(skip.metadata_props))
    node.outputs[0].type, node.outputs[0].shape = stream.type, stream.shape
    return node
