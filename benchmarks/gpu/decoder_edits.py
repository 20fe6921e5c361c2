"""What a captured decoder's graph is changed to, to be timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.cleanup.split_skip_norms import SplitSkipNormsPass
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.rewriting import remove_unused

Edit = Callable[[ir.Model], None]
"""Changes a finished graph in place."""


def remove_mlps(model: ir.Model, layers: Collection[int]) -> None:
    """Takes MLPs and their norms out of a dense graph, in place: what no decision at run time can be faster than.

    Args:
        model: With its weights. Norms are fused with additions afterwards, the first one, which has none, is not.
        layers: Whose MLPs go.
    """
    part_norms(model)
    for layer in reversed(find_decoder_layers(model.graph)):
        if layer.index in layers:
            for use in tuple(layer.mlp.stream_out.uses()):
                use.node.replace_input_with(use.idx, layer.mlp.stream_in)
    remove_unused(model.graph)
    JoinSkipNormsPass()(model)


def part_norms(model: ir.Model) -> None:
    """Takes norms apart from additions, in place."""
    SplitSkipNormsPass()(model)


def fuse_additions_alone(model: ir.Model) -> None:
    """Leaves norms alone that stand behind no addition, in place."""
    part_norms(model)
    JoinSkipNormsPass()(model)


NORMS: dict[str, Edit | None] = {
    "as exported": None,
    "fused with additions, not with zeros": fuse_additions_alone,
    "apart": part_norms,
}
"""How a decoder norms: as it is exported, every norm fused with an addition, and otherwise."""
