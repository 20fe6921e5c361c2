"""Which nodes make shapes that depend on data: what TensorRT cannot capture in a CUDA graph and pays a sync for."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import SHAPE_OPS, consumed_values, is_op, subgraphs_of
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE, MICROSOFT

# The shape of their output follows from the contents of their input alone.
_SELECTING_OPS = frozenset(
    {"Compress", "ImageDecoder", "NonMaxSuppression", "NonZero", "StringNormalizer", "StringSplit", "Unique"}
)
# Inputs whose contents the shape of the output follows from, by position. Source: ONNX operator schemas, opset 24.
_SIZE_OPERANDS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"), (1,)),
    **dict.fromkeys(("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"), (1,)),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "SequenceAt": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
# Computed from nothing, and yet not known before the graph runs.
_RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# The dlo ops have the shapes of their inputs by their schemas, but for the one that selects.
_KNOWN_DOMAINS = frozenset({"", DOMAIN})
# ONNX Runtime's own: a cache is as long as its past, or as the number of tokens that the operand says.
_MICROSOFT_SIZE_OPERANDS: dict[str, tuple[int, ...]] = {"GroupQueryAttention": (6,)}


def data_dependent_shapes(graph: ir.Graph) -> Iterator[str]:
    """Nodes that make a shape depend on tensor data, subgraphs included.

    Listed is where the dependence begins, not what inherits it: a graph without such a node has none at all. Data is
    the contents of graph inputs and what is computed from them; contents of initializers, outputs of Shape and Size and
    what is computed from those alone are not data. Nodes of foreign domains are listed, because nothing is known of
    their shapes.
    """
    yield from _violations(graph, set(), "")


def _violations(graph: ir.Graph, fixed: set[ir.Value], inside: str) -> Iterator[str]:
    """Violations in one graph.

    Args:
        graph: To check.
        fixed: Values whose contents are known from shapes and constants; grows.
        inside: Where the graph stands, for messages.
    """
    fixed.update(value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        here = f"{place(node)}{inside}"
        yield from (f"{here}: {reason}" for reason in _reasons(node, fixed))
        within = f"{inside} inside {place(node)}"
        if _is_fixed(node, fixed):
            fixed.update(node.outputs)
            fixed.update(value for subgraph in subgraphs_of(node) for value in subgraph.inputs)
        elif is_op(node, "Loop"):
            # By induction: with a known trip count and first condition, the body's number and condition are known in
            # every iteration if they are in the next; the check below says whether the condition is.
            fixed.update(node.attributes["body"].as_graph().inputs[:2])
        for subgraph in subgraphs_of(node):
            yield from _violations(subgraph, fixed, within)
        if is_op(node, "Loop") and not _iterations_are_fixed(node, fixed):
            yield f"{here}: runs a number of iterations that is computed from tensor data"


def _is_fixed(node: ir.Node, fixed: set[ir.Value]) -> bool:
    """Whether the contents of a node's outputs are known from shapes and constants."""
    if is_op(node, *SHAPE_OPS):
        return True
    return not is_op(node, *_RANDOM_OPS) and fixed.issuperset(consumed_values(node))


def _reasons(node: ir.Node, fixed: set[ir.Value]) -> Iterator[str]:
    # Three ways: by what the op is, by an operand that says a size, by branches of an If that differ.
    known = node.domain == MICROSOFT and node.op_type in _MICROSOFT_SIZE_OPERANDS
    if node.domain not in _KNOWN_DOMAINS and not known:
        yield f"the shape rule of domain '{node.domain}' is unknown"
        return
    if is_op(node, *_SELECTING_OPS) or is_op(node, GATHER_ACTIVE.name, domain=DOMAIN):
        yield "the shape of its output depends on the contents of its input"
    operands = {"": _SIZE_OPERANDS, MICROSOFT: _MICROSOFT_SIZE_OPERANDS}.get(node.domain, {})
    for position in operands.get(node.op_type, ()):
        operand = node.inputs[position] if position < len(node.inputs) else None
        if operand is not None and operand not in fixed:
            yield f"'{operand.name}', which its output's shape follows from, is computed from tensor data"
    if is_op(node, "If") and node.inputs[0] not in fixed:
        yield from _unequal_branches(node)


def _unequal_branches(node: ir.Node) -> Iterator[str]:
    """Outputs of an If with a data-dependent condition whose branches are not known to have one shape."""
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for output, *values in zip(node.outputs, *(branch.outputs for branch in branches), strict=True):
        shapes = [None if value.shape is None else [str(dim) for dim in value.shape] for value in values]
        if shapes[0] is None or shapes[0] != shapes[1] or "None" in shapes[0]:
            yield f"its branches give '{output.name}' the shapes {shapes[0]} and {shapes[1]}"


def _iterations_are_fixed(node: ir.Node, fixed: set[ir.Value]) -> bool:
    """Whether a Loop's trip count and its conditions, before and in the body, come from shapes and constants."""
    operands = (*node.inputs[:2], node.attributes["body"].as_graph().outputs[0])
    return all(value is None or value in fixed for value in operands)
