"""Which nodes compute every token's row by itself, so that they may run on some rows only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import onnx_ir as ir

from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import NORM_OPS, ConstantValues, constant_integers, is_op, rank
from dlo_export.graph_passes.spec.ops import MICROSOFT


def row_rank(nodes: Iterable[ir.Node]) -> tuple[int, list[str]]:
    """Rank in which a [batch, sequence, hidden] computation can run on gathered rows.

    Args:
        nodes: The computation, every node reading values of the computation and constants.

    Returns:
        2 when [rows, hidden] will do, 3 when a node counts its axes from the front and needs [1, rows, hidden]; and
        the reasons, with their places, why some node does not work row by row (empty if all do).
    """
    needed, problems, constants = 2, [], ConstantValues()
    for node in nodes:
        found = _node_rank(node, constants)
        if found is None:
            problems.append(f"{place(node)} does not compute each token by itself")
        else:
            needed = max(needed, found)
    return needed, problems


def token_wise_nodes(
    nodes: Iterable[ir.Node], source: ir.Value, others: Collection[ir.Value] = (), *, most: int = 2
) -> tuple[ir.Node, ...]:
    """Those nodes, in order, that can run on rows of `source`.

    Args:
        nodes: In topological order; what else they read is left to the others.
        source: [batch, sequence, hidden].
        others: Columns [batch, sequence, 1] that may be read besides.
        most: Rank of the rows at most: 2 for [rows, hidden], 3 for [1, rows, hidden].
    """
    found: list[ir.Node] = []
    reached, constants = {source, *others}, ConstantValues()
    for node in nodes:
        computed = [value for value in node.inputs if value is not None and value not in constants]
        rank = _node_rank(node, constants)
        if rank is not None and rank <= most and reached.issuperset(computed):
            found.append(node)
            reached.update(node.outputs)
    return tuple(found)


def _node_rank(node: ir.Node, constants: ConstantValues) -> int | None:
    rule = _RULES.get((node.domain, node.op_type))
    return None if rule is None else rule(node, constants)


def _matmul_rank(node: ir.Node, constants: ConstantValues) -> int | None:
    weight = node.inputs[1]
    if weight is None or weight not in constants or _weight_rank(weight) != 2:
        return None
    # ONNX Runtime makes a Gemm of a MatMul of two dimensions and the addition behind it, and then dequantises the
    # weight in every step, instead of multiplying by its codes.
    return 3 if is_op(weight.producer(), "DequantizeLinear") else 2


def _weight_rank(weight: ir.Value) -> int | None:
    """Rank of a constant, looking behind the Cast or Transpose that prepares it."""
    value: ir.Value | None = weight
    while value is not None:
        if (found := rank(value)) is not None:
            return found
        node = value.producer()
        value = None if node is None else node.inputs[0]
    return None


def _pointwise_rank(node: ir.Node, constants: ConstantValues) -> int | None:
    """Constants may broadcast along the hidden axis only; written with leading ones they need rank 3."""
    needed = 2
    for value in node.inputs:
        if value is None or value not in constants:
            continue
        tensor_rank = _weight_rank(value)
        if tensor_rank is None or tensor_rank > 3:
            return None
        if tensor_rank > 1:
            if value.shape is None or any(dim != 1 for dim in tuple(value.shape)[:-1]):
                return None
            needed = 3
    return needed


def _axis_rank(axis: int) -> int | None:
    return {-1: 2, 2: 3}.get(axis)


def _norm_rank(node: ir.Node, _constants: ConstantValues) -> int | None:
    return _axis_rank(node.attributes.get_int("axis", -1))


def _split_rank(node: ir.Node, _constants: ConstantValues) -> int | None:
    return _axis_rank(node.attributes.get_int("axis", 0))


def _reduction_rank(node: ir.Node, _constants: ConstantValues) -> int | None:
    # Over the hidden axis alone, which must stay: without it, what follows would count its axes from the front.
    axes = node.attributes.get_ints("axes") or constant_integers(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is None or len(axes) != 1 or node.attributes.get_int("keepdims", 1) != 1:
        return None
    return _axis_rank(axes[0])


_POINTWISE = (
    *("Abs", "Add", "Cast", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Greater", "Identity", "Less", "Log", "Max"),
    *("Min", "Mul", "Neg", "Pow", "Reciprocal", "Sin", "Sqrt", "Sub", "Where"),
    *("Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Sigmoid", "Softplus", "Swish", "Tanh"),
)
# How each op that may stand in an MLP branch treats rows. An op that is missing here is refused: better than a guess.
_RULES: dict[tuple[str, str], Callable[[ir.Node, ConstantValues], int | None]] = {
    **{("", op_type): _pointwise_rank for op_type in _POINTWISE},
    **{(MICROSOFT, op_type): _pointwise_rank for op_type in ("BiasGelu", "FastGelu", "QuickGelu")},
    **dict.fromkeys(NORM_OPS, _norm_rank),
    **{("", op_type): _reduction_rank for op_type in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum")},
    ("", "ReduceSumSquare"): _reduction_rank,
    ("", "Split"): _split_rank,
    ("", "MatMul"): _matmul_rank,
    (MICROSOFT, "MatMulNBits"): lambda _node, _constants: 2,
}
