"""Tell a decoder layer's weights apart by what they feed: which matrix is k_proj, which is gate_proj."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import LAYER_TABLES, LLAMA_LAYER, LayerModule, LayerTable
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import NORM_OPS, SHAPE_OPS, constant_behind, constant_tensor, is_op
from dlo_export.graph_passes.find.linear_flow import LinearFlow, Part
from dlo_export.graph_passes.find.residual_stream import ResidualBlock
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.weights.dense import DenseStorage, dense_storage
from dlo_export.graph_passes.weights.linear import linear_bias
from dlo_export.graph_passes.weights.storage import Place, StoredRows, WeightStorage

# Inputs of ops that hold cosines and sines.
_ROTARY_TABLES = {
    ("", "RotaryEmbedding"): (1, 2),
    (MICROSOFT, "RotaryEmbedding"): (2, 3),
    (MICROSOFT, "GroupQueryAttention"): (7, 8),
}
HEAD_NORM_INPUTS: Mapping[tuple[str, str], Mapping[str, int]] = {
    (MICROSOFT, "GroupQueryAttention"): {"q_norm": 14, "k_norm": 15}
}
"""Inputs of attention operators that hold the norms of queries and keys, where they compute these themselves."""

_ACTIVATIONS = frozenset({"Sigmoid", "Swish", "Gelu", "FastGelu", "QuickGelu", "Relu", "Tanh", "Erf", "HardSwish"})


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """One weight of a decoder layer: all of what a node computes with, or some of it where several lie side by side.

    Attributes:
        tensor: Its Hugging Face name inside the layer, "self_attn.q_proj.weight".
        storage: How, and where, the graph stores it.
        start: Its first row there, in the shape of a checkpoint.
        stop: Behind its last row.
    """

    tensor: str
    storage: WeightStorage
    start: int
    stop: int

    @property
    def weight(self) -> ir.Value:
        """The constant that holds it, or most of it."""
        return self.storage.constants[0]

    @property
    def contents(self) -> StoredRows:
        """As a checkpoint's tensor: linear weights are [out, in], whatever they are stored as."""
        return StoredRows(self.storage, self.start, self.stop)


def find_projections(
    attention: ResidualBlock, mlp: ResidualBlock, present_key: ir.Value, present_value: ir.Value, where: str
) -> Mapping[str, Projection]:
    """Name every weight of a layer by its role.

    Args:
        attention: The layer's attention block.
        mlp: Its MLP block.
        present_key: Graph output that holds its keys, which tells k_proj.
        present_value: Graph output that holds its values, which tells v_proj.
        where: The layer, for messages.

    Returns:
        Projections by role: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, input_layernorm,
        post_attention_layernorm (or the norms behind attention and MLP, by OLMo2's roles), q_norm and k_norm where
        there are norms of queries and keys, and "{role}.bias" where there is one.

    Raises:
        GraphPassError: A role is missing or ambiguous, or a weight has none, with all problems.
    """
    # Who feeds whom decides: k_proj is what present keys come from, gate_proj what an activation reads, down_proj what
    # the branch comes from; query and up are what is left of the first matrices of their blocks.
    try:
        flow, mlp_flow = LinearFlow(attention.nodes), LinearFlow(mlp.nodes)
    except GraphPassError as err:
        raise GraphPassError(f"projections of {where}: {err.message}", hint=err.hint) from err
    key, value = flow.of(present_key), flow.of(present_value)
    gate = frozenset().union(*(mlp_flow.union(node.inputs) for node in mlp.nodes if node.op_type in _ACTIVATIONS))
    matrices = {
        "q_proj": flow.first_without(key | value),
        "k_proj": key,
        "v_proj": value,
        "o_proj": flow.of(attention.branch),
        "gate_proj": gate,
        "up_proj": mlp_flow.first_without(gate),
        "down_proj": mlp_flow.of(mlp.branch),
    }
    table, norms = _block_norms({"self_attn": (attention, flow), "mlp": (mlp, mlp_flow)})
    norms |= _qk_norms(table, attention, flow, matrices, present_key)
    _refuse_ambiguity(matrices, norms, table, where)
    found = {
        role: Projection(table[role].weight, vector, 0, vector.shape[0])
        for role, vectors in norms.items()
        for vector in vectors
    }
    # Projections side by side share their bias as they share their matrix.
    biases = {matrix: linear_bias(matrix.node) for matrix in (*flow.matrices, *mlp_flow.matrices)}
    for role, parts in matrices.items():
        for matrix, start, stop in parts:
            module, bias = LLAMA_LAYER[role], biases[matrix]
            found[role] = Projection(module.weight, matrix, start, stop)
            if bias is not None:
                found[f"{role}.bias"] = Projection(module.bias_name, bias, start, stop)
    _refuse_other_weights((attention, mlp), found.values(), where)
    return found


def key_width(attention: ResidualBlock, present_key: ir.Value) -> int | None:
    """Columns of what the keys of all heads are computed from, whatever else is done to them; None if not one matrix.

    Args:
        attention: A layer's attention block.
        present_key: Graph output that holds its keys.

    Raises:
        GraphPassError: A matrix is stored in a way that is not understood.
    """
    widths = {part.stop - part.start for part in LinearFlow(attention.nodes).of(present_key)}
    return widths.pop() if len(widths) == 1 else None


def branch_ends(block: ResidualBlock) -> tuple[str, ...]:
    """The matrices that what a block adds to the stream comes from, by the places of their nodes: one in a Llama.

    Raises:
        GraphPassError: A matrix is stored in a way that is not understood.
    """
    return tuple(sorted(_named(part) for part in LinearFlow(block.nodes).of(block.branch)))


def _block_norms(
    blocks: Mapping[str, tuple[ResidualBlock, LinearFlow]],
) -> tuple[LayerTable, dict[str, list[DenseStorage]]]:
    """The family's table whose norms are all there (Llama's where none is), and what may be each of them.

    A norm's weight is a vector that scales what no matrix of the block has touched yet, or what its last one has.
    """

    def weights_of(norm: LayerModule) -> list[DenseStorage]:
        block, flow = blocks[norm.block]
        return list(_norm_weights(block.nodes, flow, flow.of(block.branch) if norm.behind else frozenset()))

    by_table = [
        (table, {norm.role: weights_of(norm) for norm in table if norm.is_norm and norm.only_with is None})
        for table in LAYER_TABLES
    ]
    return next((found for found in by_table if all(found[1].values())), by_table[0])


def _refuse_ambiguity(
    matrices: Mapping[str, frozenset[Part]], norms: Mapping[str, list[DenseStorage]], table: LayerTable, where: str
) -> None:
    """Raises unless every role is one weight: of none or several, nothing is taken for granted."""
    problems = []
    if matrices["k_proj"] & matrices["v_proj"]:
        problems.append("query, key and value share one matrix, and nothing says which columns are whose")
    for role, parts in matrices.items():
        if len(parts) != 1:
            problems.append(_not_one(role, [_named(part) for part in parts]))
    for role, vectors in norms.items():
        if len(vectors) != 1:
            problems.append(_not_one(role, [place(vector.node) for vector in vectors], table))
    if problems:
        raise GraphPassError(
            f"projections of {where}: " + "; ".join(problems) + ". Expected exactly one per role.",
            hint="inject the layer into the checkpoint instead, and export that; masking and skipping MLPs needs no "
            "projections",
        )


def _not_one(role: str, candidates: Sequence[str], table: LayerTable = LLAMA_LAYER) -> str:
    return f"{table[role].path} could be {', '.join(candidates) or 'no node with a constant weight'}"


def _named(part: Part) -> str:
    columns = "" if part.whole else f" (columns {part.start} to {part.stop})"
    return f"{place(part.matrix.node)}{columns}"


def _qk_norms(
    table: LayerTable,
    attention: ResidualBlock,
    flow: LinearFlow,
    matrices: Mapping[str, frozenset[Part]],
    present_key: ir.Value,
) -> dict[str, list[DenseStorage]]:
    """Norms of queries and of keys; none where there are none, only one of the two, or of another width.

    What scales queries has touched q_proj and nothing else, or is an input of the operator that attends. The family's
    table says whether heads are normalised one by one, or all together.
    """
    head_dim = _head_dim(matrices["k_proj"], present_key)
    found = {}
    for role, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
        vectors = list(_norm_weights(attention.nodes, flow, matrices[projection]))
        inside = [(node, HEAD_NORM_INPUTS.get((node.domain, node.op_type), {}).get(role)) for node in attention.nodes]
        read = (dense_storage(Place(node, index), "vector") for node, index in inside if index is not None)
        vectors += [vector for vector in read if vector is not None]
        by_head = table[role].axes == ("head",)
        widths = {head_dim} if by_head else {part.stop - part.start for part in matrices[projection]}
        if {vector.shape[0] for vector in vectors} == widths:
            found[role] = vectors
    return found if len(found) == 2 else {}


def _head_dim(key: frozenset[Part], present_key: ir.Value) -> int | None:
    """Width of a head: as the cache's shape says it, or as k_proj's width and the number of heads do."""
    if present_key.shape is None or len(present_key.shape) != 4:
        return None
    _, heads, _, head_dim = present_key.shape
    if isinstance(head_dim, int):
        return head_dim
    widths = {part.stop - part.start for part in key}
    return widths.pop() // heads if isinstance(heads, int) and heads > 0 and len(widths) == 1 else None


def _refuse_other_weights(blocks: Sequence[ResidualBlock], named: Collection[Projection], where: str) -> None:
    """Raises if a layer computes with a weight that has no role, such as the norms of queries and keys.

    A copy of the layer would share it with the original, and what names weights by role would not see it.
    """
    known = {constant for projection in named for constant in projection.storage.constants}
    problems = []
    for block in blocks:
        # Only what meets the tokens' values is a weight: tables are looked up by positions, shapes are constants.
        computed = {block.stream_in}
        for node in block.nodes:
            if is_op(node, *SHAPE_OPS) or not any(value in computed for value in node.inputs):
                continue
            problems += [
                f"{place(node)} reads weight '{weight.name}' {list(tensor.shape.numpy())}, which has no role in a layer"
                for weight, tensor in _float_constants(node, computed)
                if weight not in known
            ]
            computed.update(node.outputs)
    if problems:
        raise GraphPassError(
            f"projections of {where}: " + "; ".join(problems) + ".",
            hint="not a plain decoder: only layers of projections and their norms can be copied or compared",
        )


def _float_constants(node: ir.Node, computed: Collection[ir.Value]) -> Iterable[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants of more than one float that a node reads; rotary tables excepted, which hold no weights.

    What is computed from the stream is not constant: looking behind it would walk the same chain for every node of it.
    """
    tables = _ROTARY_TABLES.get((node.domain, node.op_type), ())
    for index, value in enumerate(node.inputs):
        base = None if index in tables or value in computed else constant_behind(value)
        tensor = None if base is None else constant_tensor(base[0])
        if base is not None and tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point():
            yield base[0], tensor


def _norm_weights(nodes: Iterable[ir.Node], flow: LinearFlow, touched_by: frozenset[Part]) -> Iterable[DenseStorage]:
    """Vectors that scale a value that these parts of matrices have touched, and no others yet."""
    for node in nodes:
        if flow.union(node.inputs) != touched_by:
            continue
        inputs = (1,) if (node.domain, node.op_type) in NORM_OPS else (0, 1) if is_op(node, "Mul") else ()
        vectors = (dense_storage(Place(node, index), "vector") for index in inputs)
        yield from (vector for vector in vectors if vector is not None and vector.shape[0] > 1)
