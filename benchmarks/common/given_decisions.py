"""Decisions that no router computes: what is left of what routing costs are the branches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.common.one_router import reduced_by
from dlo_export.checkpoints.interface import INPUT_IDS
from dlo_export.graph_passes.rewriting import remove_unused
from dlo_export.graph_passes.spec.provenance import TaggedNodes, shared_constant, shared_node

_TAGS = TaggedNodes("given_decisions", None).tags


def decisions_given(lowered: Path, active: Sequence[bool], name: str) -> Path:
    """Writes beside a graph one whose Ifs are told what to do, by two values that each step computes once.

    They come of the token ids, which are never negative, so that no runtime folds the Ifs away.

    Args:
        lowered: Routed, with `--lowering if`, its routers scaling nothing.
        active: For every If in order, whether all tokens of the step are active in it, or none.
        name: Of the new graph, which shares the weights.
    """
    model = ir.load(lowered)
    graph = model.graph
    conditionals = [node for node in graph if node.op_type == "If"]
    for conditional, runs in zip(conditionals, active, strict=True):
        condition = conditional.inputs[0]
        assert condition is not None
        tokens = reduced_by(condition)
        assert tokens.shape is not None, "of a graph of ours"
        given = _of_tokens(graph, runs, tokens.shape, conditionals[0])
        reached = shared_node(
            graph,
            "ReduceMax",
            given,
            name=f"{given.name}.any",
            tags=_TAGS,
            dtype=ir.DataType.BOOL,
            shape=(),
            before=conditionals[0],
            keepdims=0,
        )
        condition.replace_all_uses_with(reached)
        tokens.replace_all_uses_with(given)
    remove_unused(graph)
    graph.sort()
    path = lowered.with_name(f"{name}.onnx")
    ir.save(model, path)
    return path


def _of_tokens(graph: ir.Graph, active: bool, shape: ir.Shape, before: ir.Node) -> ir.Value:
    """The same decision for all tokens, bool [batch, sequence], or with an axis more that is 1 wide."""
    ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
    zero = shared_constant(graph, "given.zero", np.array(0, np.int64))
    operator, name = ("GreaterOrEqual", "given.active") if active else ("Less", "given.skipped")
    boolean, sizes = ir.DataType.BOOL, ("batch", "sequence")
    given = shared_node(graph, operator, ids, zero, name=name, tags=_TAGS, dtype=boolean, shape=sizes, before=before)
    if len(shape) == len(sizes):
        return given
    single = [axis for axis, size in enumerate(shape) if size == 1]
    return shared_node(
        graph,
        "Unsqueeze",
        given,
        shared_constant(graph, "given.single_axis", np.array(single, np.int64)),
        name=f"{name}_with_axis",
        tags=_TAGS,
        dtype=boolean,
        shape=shape,
        before=before,
    )
