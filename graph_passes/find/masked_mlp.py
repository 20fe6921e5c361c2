"""Recognise the masked canonical form of a routed MLP block, whoever wrote it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import layer_tensor_name
from dlo_export.graph_passes.errors import place
from dlo_export.graph_passes.find.data_flow import is_constant
from dlo_export.graph_passes.find.decoder_layers import DecoderLayer
from dlo_export.graph_passes.find.masked_branch import Mismatch, column_source, foreign_uses, match_masked_branch
from dlo_export.graph_passes.find.residual_stream import ResidualBlock


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedMlp:
    """A block `y = h + where(active, [scale ·] mlp(h), 0)`.

    Attributes:
        layer: The decoder layer.
        active: bool [batch, sequence].
        select: The Where node.
        kept: What it keeps where active: the branch, scaled if it is.
        scale: Per-token factor [batch, sequence], None when the branch is not scaled per token.
        scaling: The Mul that applies it.
        nodes: Nodes from h to `kept`, `scaling` included, topologically ordered.
    """

    layer: DecoderLayer
    active: ir.Value
    select: ir.Node
    kept: ir.Value
    scale: ir.Value | None
    scaling: ir.Node | None
    nodes: tuple[ir.Node, ...]

    @property
    def block(self) -> ResidualBlock:
        """The residual block that is masked."""
        return self.layer.mlp

    @property
    def path(self) -> str:
        """What its values are named after."""
        return layer_tensor_name(self.layer.index, "mlp")


def match_masked_mlp(layer: DecoderLayer) -> MaskedMlp | Mismatch:
    """Match the MLP block of a layer against the masked form.

    Returns:
        The parts, or the reason why not. The branch must read nothing but h, constants and the scale, and none of its
        values may be used elsewhere: else running it on some tokens only would change the graph's meaning.
    """
    branch = match_masked_branch(layer.index, layer.mlp, "MLP")
    if isinstance(branch, Mismatch):
        return branch
    # The form fits; the rest asks whether the branch may be run on some tokens only.
    nodes = tuple(node for node in layer.mlp.nodes if node is not branch.select)
    scale, scaling = branch.scaling(set(nodes))
    masked = MaskedMlp(layer, branch.active, branch.select, branch.kept, scale, scaling, nodes)
    problem = _foreign_read(masked) or _foreign_use(masked)
    return masked if problem is None else Mismatch(problem, masked=True)


def _at(layer: DecoderLayer, node: ir.Node) -> str:
    return f"layer {layer.index}: {place(node)}"


def _foreign_read(masked: MaskedMlp) -> str | None:
    inner = {masked.layer.mlp.stream_in, *(output for node in masked.nodes for output in node.outputs)}
    for node in masked.nodes:
        for value in node.inputs:
            if value is None or value in inner or is_constant(value):
                continue
            # The scale is the one value from elsewhere that may come in: a lowering gathers it along with the rows.
            if node is masked.scaling and column_source(value) is masked.scale:
                continue
            return f"{_at(masked.layer, node)} of the MLP branch reads '{value.name}', not the stream after attention"
    return None


def _foreign_use(masked: MaskedMlp) -> str | None:
    for node, user in foreign_uses((*masked.nodes, masked.select), masked.layer.mlp):
        return f"{_at(masked.layer, node)} of the MLP branch is used elsewhere, by {user}"
    return None
