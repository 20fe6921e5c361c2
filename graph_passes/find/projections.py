"""Tell a decoder layer's weights apart by what they feed: which MatMul is k_proj, which is gate_proj."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, LayerModule
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import SHAPE_OPS, constant_tensor, is_op
from dlo_export.graph_passes.find.residual_stream import ResidualBlock

Layout = Literal["in_out", "out_in", "vector"]

# Attention ops that take query, key, value as inputs 0, 1, 2 and return the present key and value as outputs 1, 2.
_ATTENTION_OPS = (("", "Attention"), ("com.microsoft", "GroupQueryAttention"), ("com.microsoft", "MultiHeadAttention"))
_NORM_OPS = (
    ("", "RMSNormalization"),
    ("", "LayerNormalization"),
    # ONNX Runtime registers this contrib op in the default domain; some exporters write com.microsoft.
    ("", "SimplifiedLayerNormalization"),
    ("com.microsoft", "SimplifiedLayerNormalization"),
)
# Inputs of ops that hold cosines and sines.
_ROTARY_TABLES = {
    ("", "RotaryEmbedding"): (1, 2),
    ("com.microsoft", "RotaryEmbedding"): (2, 3),
    ("com.microsoft", "GroupQueryAttention"): (7, 8),
}
# What may stand between a stored weight and the node that computes with it.
_PREPARATIONS = ("Identity", "Cast", "Transpose")
_ACTIVATIONS = frozenset({"Sigmoid", "Swish", "Gelu", "FastGelu", "QuickGelu", "Relu", "Tanh", "Erf", "HardSwish"})


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """One weight of a decoder layer and where it enters the computation.

    Attributes:
        tensor: Its Hugging Face name inside the layer, "self_attn.q_proj.weight".
        weight: The constant itself; between it and the node that reads it may stand Identity, Cast and Transpose.
        layout: How `weight` is stored: "out_in" as in a checkpoint, "in_out" as a MatMul reads it, or "vector".
        node: The node that computes with it.
        input_index: Which of the node's inputs it (or what is derived from it) is.
    """

    tensor: str
    weight: ir.Value
    layout: Layout
    node: ir.Node
    input_index: int


@dataclasses.dataclass(frozen=True, eq=False)
class _LinearFlow:
    """Linear nodes of a block, and for every value the linear nodes it was computed from most directly."""

    linears: list[ir.Node]
    nearest: dict[ir.Value, frozenset[ir.Node]]

    def of(self, value: ir.Value) -> frozenset[ir.Node]:
        return self.nearest.get(value, frozenset())

    def first(self) -> list[ir.Node]:
        """Linear nodes that no other linear node of the block feeds."""
        return [node for node in self.linears if not _union(self, node.inputs)]


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
        post_attention_layernorm, q_norm and k_norm where there are norms of queries and keys, and "{role}.bias" where
        there is one.

    Raises:
        GraphPassError: A role is missing or ambiguous, or a weight has none, with all problems.
    """
    # Who feeds whom decides: k_proj is what present keys come from, gate_proj what an activation reads, down_proj what
    # the branch comes from; query and up are what is left of the first linear nodes of their blocks.
    flow, mlp_flow = _trace_linears(attention.nodes), _trace_linears(mlp.nodes)
    key, value = flow.of(present_key), flow.of(present_value)
    gate = frozenset().union(*(_union(mlp_flow, node.inputs) for node in mlp.nodes if node.op_type in _ACTIVATIONS))
    linears = {
        "q_proj": frozenset(flow.first()) - key - value,
        "k_proj": key,
        "v_proj": value,
        "o_proj": flow.of(attention.branch),
        "gate_proj": gate,
        "up_proj": frozenset(mlp_flow.first()) - gate,
        "down_proj": mlp_flow.of(mlp.branch),
    }
    # A norm's weight is a vector that scales what no linear node of the block has touched yet.
    traced = {"self_attn": (attention.nodes, flow), "mlp": (mlp.nodes, mlp_flow)}
    norms = {
        module.role: dict(_norm_weights(*traced[module.block]))
        for module in LLAMA_LAYER
        if module.is_norm and module.only_with is None
    }
    norms |= _head_norms(attention, flow, linears, present_key)
    # A role is one weight. None or several, or a weight without a role: then nothing is taken for granted.
    problems = ["query, key and value share one MatMul (fused projections)"] if key & value else []
    for role, candidates in (*linears.items(), *norms.items()):
        if len(candidates) != 1:
            nodes = ", ".join(place(node) for node in candidates) or "no node with a constant weight"
            problems.append(f"{LLAMA_LAYER[role].path} could be {nodes}")
    if problems:
        raise GraphPassError(
            f"projections of {where}: " + "; ".join(problems) + ". Expected exactly one node per role.",
            hint="export the graph unfused and unquantised, or inject the layer into the checkpoint instead",
        )
    found = {
        role: _projection(LLAMA_LAYER[role].weight, node, index, "vector")
        for role, candidates in norms.items()
        for node, index in candidates.items()
    }
    for role, candidates in linears.items():
        found.update(_linear_projections(LLAMA_LAYER[role], next(iter(candidates))))
    _refuse_other_weights((attention, mlp), {projection.weight for projection in found.values()}, where)
    return found


def _trace_linears(nodes: Iterable[ir.Node]) -> _LinearFlow:
    flow = _LinearFlow([], {})
    # A value carries the linear nodes it comes from through everything that is not linear itself; shapes carry nothing.
    for node in nodes:
        if is_op(node, *SHAPE_OPS):
            continue
        if is_op(node, "MatMul", "Gemm") and _constant_behind(node.inputs[1]) is not None:
            flow.linears.append(node)
            flow.nearest[node.outputs[0]] = frozenset({node})
        elif (node.domain, node.op_type) in _ATTENTION_OPS:
            _trace_attention(node, flow)
        else:
            upstream = _union(flow, node.inputs)
            flow.nearest.update(dict.fromkeys(node.outputs, upstream))
    return flow


def _trace_attention(node: ir.Node, flow: _LinearFlow) -> None:
    """Each present output comes from its own input only; packed inputs leave key and value out."""
    query, key, value = (*node.inputs, None, None)[:3]
    # Where inputs are packed, the first one holds all three.
    key, value = key or query, value or query
    per_output = ((query, key, value), (key,), (value,))
    for output, sources in zip(node.outputs, per_output, strict=False):
        flow.nearest[output] = _union(flow, sources)


def _union(flow: _LinearFlow, values: Iterable[ir.Value | None]) -> frozenset[ir.Node]:
    return frozenset().union(*(flow.of(value) for value in values if value is not None))


def _head_norms(
    attention: ResidualBlock, flow: _LinearFlow, linears: Mapping[str, frozenset[ir.Node]], present_key: ir.Value
) -> dict[str, dict[ir.Node, int]]:
    """Norms of queries and of keys, head by head; none where there are none, or only one of the two.

    What scales queries has touched q_proj and nothing else. A norm over the width of all heads has no role here.
    """
    head_dim = present_key.shape[-1] if present_key.shape is not None else None
    found = {}
    for role, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
        places = dict(_norm_weights(attention.nodes, flow, linears[projection]))
        bases = (_constant_behind(node.inputs[index]) for node, index in places.items())
        sizes = {base[0].const_value.size for base in bases if base is not None and base[0].const_value is not None}
        if sizes == {head_dim}:
            found[role] = places
    return found if len(found) == 2 else {}


def _linear_projections(module: LayerModule, node: ir.Node) -> dict[str, Projection]:
    """The weight of a MatMul or Gemm, and its bias: Gemm's third input or an Add behind the node."""
    bias = f"{module.role}.bias"
    transposed = is_op(node, "Gemm") and node.attributes.get_int("transB", 0) == 1
    found = {module.role: _projection(module.weight, node, 1, "out_in" if transposed else "in_out")}
    if is_op(node, "Gemm") and len(node.inputs) > 2 and _constant_behind(node.inputs[2]) is not None:
        found[bias] = _projection(module.bias_name, node, 2, "vector")
    consumers = node.outputs[0].consumers()
    if len(consumers) == 1 and is_op(consumers[0], "Add"):
        for index, operand in enumerate(consumers[0].inputs):
            if _is_vector(operand):
                found[bias] = _projection(module.bias_name, consumers[0], index, "vector")
    return found


def _refuse_other_weights(blocks: Sequence[ResidualBlock], named: Collection[ir.Value], where: str) -> None:
    """Raises if a layer computes with a weight that has no role, such as the norms of queries and keys.

    A copy of the layer would share it with the original, and what names weights by role would not see it.
    """
    problems = []
    for block in blocks:
        # Only what meets the tokens' values is a weight: tables are looked up by positions, shapes are constants.
        computed = {block.stream_in}
        for node in block.nodes:
            if is_op(node, *SHAPE_OPS) or not any(value in computed for value in node.inputs):
                continue
            computed.update(node.outputs)
            problems += [
                f"{place(node)} reads weight '{weight.name}' {list(tensor.shape.numpy())}, which has no role in a layer"
                for weight, tensor in _float_constants(node)
                if weight not in named
            ]
    if problems:
        raise GraphPassError(
            f"projections of {where}: " + "; ".join(problems) + ".",
            hint="the graph is not a plain Llama's: only layers of projections and two norms can be copied or compared",
        )


def _float_constants(node: ir.Node) -> Iterable[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants of more than one float that a node reads; rotary tables excepted, which hold no weights."""
    tables = _ROTARY_TABLES.get((node.domain, node.op_type), ())
    for index, value in enumerate(node.inputs):
        base = None if index in tables else _constant_behind(value)
        tensor = None if base is None else constant_tensor(base[0])
        if base is not None and tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point():
            yield base[0], tensor


def _projection(tensor: str, node: ir.Node, input_index: int, layout: Layout) -> Projection:
    base = _constant_behind(node.inputs[input_index])
    assert base is not None, "callers have seen that the input is constant"
    weight, transposes = base
    if transposes % 2 and layout != "vector":
        layout = "out_in" if layout == "in_out" else "in_out"
    return Projection(tensor, weight, layout, node, input_index)


def _constant_behind(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The initializer or Constant output a value is derived from, and how many transposes lie between."""
    transposes = 0
    while value is not None:
        if ir.convenience.get_const_tensor(value) is not None and not value.is_graph_input():
            return value, transposes
        node = value.producer()
        if node is None or not is_op(node, *_PREPARATIONS):
            return None
        transposes += node.op_type == "Transpose"
        value = node.inputs[0]
    return None


def _norm_weights(
    nodes: Iterable[ir.Node], flow: _LinearFlow, touched_by: frozenset[ir.Node] = frozenset()
) -> Iterable[tuple[ir.Node, int]]:
    """Places where a weight vector scales a value that these linear nodes have touched, and no others yet."""
    for node in nodes:
        if _union(flow, node.inputs) != touched_by:
            continue
        if (node.domain, node.op_type) in _NORM_OPS and _constant_behind(node.inputs[1]) is not None:
            yield node, 1
        elif is_op(node, "Mul"):
            for index, operand in enumerate(node.inputs):
                if _is_vector(operand):
                    yield node, index


def _is_vector(value: ir.Value | None) -> bool:
    base = _constant_behind(value)
    tensor = None if base is None else constant_tensor(base[0])
    return tensor is not None and len(tensor.shape) == 1 and tensor.size > 1 and tensor.dtype.is_floating_point()
