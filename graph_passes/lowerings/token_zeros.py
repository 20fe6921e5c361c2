"""Zeros in the place of what skipped tokens do not compute."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import ROUTERS
from dlo_export.graph_passes.find.residual_stream import embedding_lookup, embedding_values
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant, shared_node


def token_zeros(graph: ir.Graph, made_by: str, width: int, dtype: ir.DataType, before: ir.Node) -> ir.Value:
    """Zeros for all tokens of a step, [batch, sequence, width]: one node for all layers.

    Args:
        graph: Its layers have been found.
        made_by: Name of the pass.
        width: Of the last axis.
        dtype: Of the zeros.
        before: Where the node is inserted on first use.
    """
    tokens = embedding_lookup(embedding_values(graph)[0]).inputs[1]
    assert tokens is not None, "an embedding is looked up by token ids"
    tags, int64, batch_and_sequence = TaggedNodes(made_by, None).tags, ir.DataType.INT64, (tokens.shape or (None, None))
    sizes = shared_node(
        graph, "Shape", tokens, name=f"{ROUTERS}.token_sizes", tags=tags, dtype=int64, shape=(2,), before=before
    )
    last = shared_constant(graph, f"{ROUTERS}.width_{width}", np.array([width], np.int64))
    name = f"{ROUTERS}.shape_{width}"
    shape = shared_node(
        graph, "Concat", sizes, last, name=name, tags=tags, dtype=int64, shape=(3,), before=before, axis=0
    )
    return shared_node(
        graph,
        "ConstantOfShape",
        shape,
        name=f"{ROUTERS}.zeros_{width}_{dtype.name.lower()}",
        tags=tags,
        dtype=dtype,
        shape=(*batch_and_sequence, width),
        before=before,
        value=ir.tensor(np.zeros(1, dtype.numpy())),
    )
