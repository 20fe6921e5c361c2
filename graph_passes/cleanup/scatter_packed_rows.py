"""Put the rows of a packed product in their places at once, before they are split."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.find.data_flow import is_op, producer_of, subgraphs_of
from dlo_export.graph_passes.lowerings.token_zeros import token_zeros
from dlo_export.graph_passes.rewriting import remove_unused, replace_value
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY, TaggedNodes, layer_of


@dataclasses.dataclass(frozen=True)
class ScatterPackedRowsPass(GraphPass):
    """Scatter active tokens' rows of query, key and value once, where they come from one product.

    Before::

        q, k, v    = Split(rows, sizes)                         # [n, …], of active tokens
        q', k', v' = ScatterND(zeros, idx, q), ScatterND(zeros, idx, k), ScatterND(zeros, idx, v)

    After::

        q', k', v' = Split(ScatterND(zeros, idx, rows), sizes)  # [batch, sequence, …]

    Of a decode step two of a layer's nodes are saved. Optional: where something stands between (a bias, a norm of
    heads), the rows of each are put in their places as before. Scope: main graph and branches. Source: ONNX
    ScatterND-11.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (FuseSiblingMatMulsPass,)
    nodes_from: ClassVar[Border | None] = "routed"

    def rewrite(self, model: ir.Model) -> bool:
        """Rewrite every product whose parts are scattered alike."""
        graph = model.graph
        # By the node of the main graph in front of which what they share can stand.
        found = [(node, node) for node in graph]
        found += [(inner, node) for node in graph for branch in subgraphs_of(node) for inner in branch]
        packed = [(node, holder, scatters) for node, holder in found if (scatters := _scatters(node))]
        for split, holder, scatters in packed:
            self._rewrite(graph, split, holder, scatters)
        if packed:
            remove_unused(graph)
            graph.sort()
        return bool(packed)

    def _rewrite(self, graph: ir.Graph, split: ir.Node, holder: ir.Node, scatters: list[ir.Node]) -> None:
        rows, (first, *_), scope = split.inputs[0], scatters, split.graph
        assert isinstance(scope, ir.Graph), "of the main graph, or a branch"
        assert rows is not None, "Split has an input"
        places = first.inputs[1]
        widths = [_width(scatter) for scatter in scatters]
        dtype = first.outputs[0].dtype
        assert places is not None, "ScatterND has indices"
        assert dtype is not None, "what a lowering scatters has a type"
        # Made as the lowering makes them: what they need of the step's sizes is there already.
        zeros = token_zeros(graph, first.metadata_props[PASS_KEY], sum(widths), dtype, holder)

        new, name = TaggedNodes(self._name, layer_of(first)), f"{rows.name}.all_tokens"
        placed = new.add("ScatterND", zeros, places, rows, name=name, dtype=dtype, shape=zeros.shape)
        scope.insert_before(split, new.nodes)
        split.replace_input_with(0, placed)
        # The parts are for all tokens now, and take the places and names of what was scattered.
        for part, scatter in zip(split.outputs, scatters, strict=True):
            old = scatter.outputs[0]
            part.type, part.shape = old.type, old.shape
            replace_value(old, part)
        scope.remove(scatters, safe=True)


def _scatters(split: ir.Node) -> list[ir.Node]:
    """The nodes that put a split product's parts in their places; none where they are not all there is."""
    # Counted from the back: rows have one axis less than what they are put in.
    if not is_op(split, "Split") or split.attributes.get_int("axis", 0) != -1:
        return []
    uses = [tuple(part.uses()) for part in split.outputs]
    shown = any(part.is_graph_output() for part in split.outputs)
    if shown or any(len(readers) != 1 or readers[0].idx != 2 for readers in uses):
        return []
    scatters = [node for ((node, _),) in uses]
    if not all(is_op(node, "ScatterND") and PASS_KEY in node.metadata_props for node in scatters):
        return []
    alike = len({node.inputs[1] for node in scatters}) == 1 and {node.graph for node in scatters} == {split.graph}
    return scatters if alike and all(map(_puts_into_zeros, scatters)) else []


def _puts_into_zeros(scatter: ir.Node) -> bool:
    zeros = producer_of(scatter.inputs[0])
    if not is_op(zeros, "ConstantOfShape") or "reduction" in scatter.attributes:
        return False
    value = zeros.attributes.get("value")
    written = value is None or not value.as_tensor().numpy().any()
    return written and scatter.outputs[0].shape is not None and isinstance(scatter.outputs[0].shape[-1], int)


def _width(scatter: ir.Node) -> int:
    shape = scatter.outputs[0].shape
    assert shape is not None, "asked by _puts_into_zeros"
    width = shape[-1]
    assert isinstance(width, int), "asked by _puts_into_zeros"
    return width
