"""ONNX Runtime's operator that adds to the residual stream and normalises the sum, made of the two and taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import constant_tensor, is_op, producer_of
from dlo_export.graph_passes.spec.ops import MICROSOFT

FUSED = "SkipSimplifiedLayerNormalization"
"""Inputs x, branch, weight, and perhaps a bias; output 0 is the norm, output 3, where asked for, the sum."""
NORM, SUM = 0, 3
ZEROS = "model.zeros"
"""Name of the node of what a norm adds that stands behind no addition."""
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")


def is_fused(node: ir.Node | None) -> bool:
    """Whether a node adds and normalises."""
    return is_op(node, FUSED, domain=MICROSOFT)


def is_norm(node: ir.Node | None) -> bool:
    """Whether a node normalises and nothing else."""
    return is_op(node, *_NORMS)


def adds_zeros(fused: ir.Node) -> bool:
    """Whether a fused node is a norm alone, made so to run faster."""
    added = fused.inputs[1]
    source = producer_of(added)
    return is_op(source, "ConstantOfShape") and source.name == ZEROS


def is_residual_addition(node: ir.Node | None) -> bool:
    """Whether a node adds a branch to the stream: the addition of a bias is none."""
    return is_op(node, "Add") and all(value is not None and constant_tensor(value) is None for value in node.inputs)


def only_norm_of(value: ir.Value, graph: ir.Graph | None) -> ir.Node | None:
    """The one norm in a graph that reads a value, its weight a constant; a second one would need a second node."""
    norms = [node for node in value.consumers() if node.graph is graph and is_op(node, *_NORMS)]
    return norms[0] if len(norms) == 1 and constant_tensor(norms[0].inputs[1]) is not None else None


def fused_node(add: ir.Node, norm: ir.Node, metadata: Mapping[str, str], *more: ir.Value) -> ir.Node:
    """Both in one, not in any graph yet; its outputs have no names.

    Args:
        add: Its inputs.
        norm: Its weight and its epsilon.
        metadata: Of the new node.
        *more: Values of the type and shape of its outputs, asked where neither the addition's nor the norm's has one.
    """
    return _fused(add.inputs, norm, metadata, norm.outputs[0], add.outputs[0], *more)


def fused_norm(norm: ir.Node, zeros: ir.Value, metadata: Mapping[str, str]) -> ir.Node:
    """A norm alone as such a node, not in any graph yet; its outputs have no names."""
    return _fused([norm.inputs[0], zeros], norm, metadata, norm.outputs[0], zeros)


def _fused(
    summands: Sequence[ir.Value | None], norm: ir.Node, metadata: Mapping[str, str], *typed: ir.Value
) -> ir.Node:
    fused = ir.node(
        FUSED,
        [*summands, norm.inputs[1]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=MICROSOFT,
        num_outputs=4,
        name=(norm.name or FUSED).removesuffix("/norm"),
        metadata_props=dict(metadata),
    )
    like = next((value for value in typed if value.type is not None), typed[0])
    for output in fused.outputs:
        output.name = ""  # nobody reads mean and variance
    for index in (NORM, SUM):
        fused.outputs[index].type, fused.outputs[index].shape = like.type, like.shape
    return fused


def new_addition(fused: ir.Node, metadata: Mapping[str, str]) -> ir.Node:
    """The addition of a fused node, not in any graph yet."""
    return _part(fused, "Add", list(fused.inputs[:2]), "add", {}, metadata)


def new_norm(fused: ir.Node, total: ir.Value, opset: int, metadata: Mapping[str, str]) -> ir.Node:
    """The norm of a fused node, not in any graph yet.

    Args:
        fused: Has the weight.
        total: What is normalised.
        opset: Of the graph: ONNX has the norm from 23 on, before it is one of ONNX Runtime's.
        metadata: Of the new node.
    """
    op_type = "RMSNormalization" if opset >= 23 else "SimplifiedLayerNormalization"
    attributes = {"axis": -1, "epsilon": fused.attributes.get_float("epsilon", 1e-12), "stash_type": 1}
    return _part(fused, op_type, [total, fused.inputs[2]], "norm", attributes, metadata)


def new_bias_addition(fused: ir.Node, metadata: Mapping[str, str]) -> ir.Node | None:
    """The addition of the bias to the branch, not in any graph yet; None where there is no bias."""
    bias = fused.inputs[3] if len(fused.inputs) > 3 else None
    return None if bias is None else _part(fused, "Add", [fused.inputs[1], bias], "add_bias", {}, metadata)


def _part(
    fused: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    suffix: str,
    attributes: dict[str, int | float],
    metadata: Mapping[str, str],
) -> ir.Node:
    like, name = fused.outputs[NORM], f"{fused.name}/{suffix}"
    node = ir.node(op_type, inputs, attributes, name=name, metadata_props=dict(metadata))
    node.outputs[0].name, node.outputs[0].type = f"{name}/output_0", like.type
    node.outputs[0].shape = None if like.shape is None else like.shape.copy()
    return node
