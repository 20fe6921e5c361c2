"""What a captured decoder's graph is changed to, to be timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.cleanup.join_skip_norms import JoinSkipNormsPass
from dlo_export.graph_passes.cleanup.skip_norms import is_residual_addition
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.rewriting import remove_unused

Edit = Callable[[ir.Model], None]
"""Changes a finished graph in place."""


def remove_mlps(model: ir.Model, layers: Collection[int]) -> None:
    """Takes MLPs and their norms out of a dense graph, in place: what no decision at run time can be faster than.

    Args:
        model: With its weights.
        layers: Whose MLPs go.
    """
    for layer in reversed(find_decoder_layers(model.graph)):
        if layer.index in layers:
            for use in tuple(layer.mlp.stream_out.uses()):
                use.node.replace_input_with(use.idx, layer.mlp.stream_in)
    remove_unused(model.graph)


def fuse_norms(model: ir.Model) -> None:
    """Makes one operator of ONNX Runtime's own of additions to the stream and the norms behind them, in place."""
    JoinSkipNormsPass(uninvited=True)(model)


def fuse_all_norms(model: ir.Model) -> None:
    """The same of norms that stand behind no addition: they get one, of zeros, made once in a step."""
    graph, zeros = model.graph, None
    for norm in [node for node in graph if is_op(node, "RMSNormalization")]:
        stream = norm.inputs[0]
        assert stream is not None, "a norm has an input"
        if is_residual_addition(stream.producer()):
            continue
        if zeros is None:
            assert stream.dtype is not None, "the pipeline types values"
            zero = ir.tensor(np.zeros(1, stream.dtype.numpy()), dtype=stream.dtype)
            shape = ir.node("Shape", [stream], outputs=[ir.val("stream.shape", dtype=ir.DataType.INT64)])
            zeros = ir.val("stream.zeros", dtype=stream.dtype, shape=stream.shape)
            filled = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": zero}, outputs=[zeros])
            graph.insert_before(norm, [shape, filled])
        total = ir.val(f"{stream.name}.and_zeros", dtype=stream.dtype, shape=stream.shape)
        graph.insert_before(norm, ir.node("Add", [stream, zeros], outputs=[total]))
        norm.replace_input_with(0, total)
    fuse_norms(model)


NORMS: dict[str, Edit | None] = {
    "as exported": None,
    "fused with additions": fuse_norms,
    "all fused": fuse_all_norms,
}
"""How a decoder norms."""
