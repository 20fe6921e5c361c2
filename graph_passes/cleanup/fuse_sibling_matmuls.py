"""Fuse MatMuls that read the same value into one wider MatMul."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.naming import unique_names
from dlo_export.graph_passes.rewriting import replace_value
from dlo_export.graph_passes.row_tensor import RowTensor, read_rows
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY, SERVES_KEY


@dataclasses.dataclass(frozen=True)
class FuseSiblingMatMulsPass(GraphPass):
    """Replace MatMuls with constant weights on one value by a single MatMul and a Split.

    Before::

        q = MatMul(x, Wq)
        k = MatMul(x, Wk)
        v = MatMul(x, Wv)

    After::

        fused   = MatMul(x, W)          # W = Wq, Wk and Wv side by side
        q, k, v = Split(fused, sizes)   # along the last axis

    Optional: a graph without such siblings is left alone. Scope: main graph and branches; siblings share one. Where
    queries serve active tokens only, keys and values all of them (`SERVES_KEY`), queries are no siblings of these: keys
    and values are fused as a pair. Nor is a router one of what it switches.

    Attributes:
        minimum: Smallest group that is fused. Three by default: query, key and value. Two siblings (gate and up) gain
            1.5 % at batch-1 decode on ONNX Runtime's CPU kernels and lose as much in prefill to the larger Split. One
            less where the query is no sibling: a second product for keys and values costs decode more than their Split.
    """

    nodes_from: ClassVar[Border | None] = "injected"

    minimum: int = 3

    def rewrite(self, model: ir.Model) -> bool:
        """Fuses every group of at least `minimum` siblings."""
        siblings: dict[tuple[object, ir.Value | None, str | None], list[ir.Node]] = {}
        for node in model.graph.all_nodes():
            if _is_fusible(node, model.graph):
                whom = node.metadata_props.get(SERVES_KEY)
                siblings.setdefault((node.graph, node.inputs[0], whom), []).append(node)
        groups = [nodes for (_, _, whom), nodes in siblings.items() if len(nodes) >= self._smallest(whom)]
        unique = unique_names(model.graph)
        for nodes in groups:
            _fuse(model.graph, nodes, unique)
        return bool(groups)

    def _smallest(self, whom: str | None) -> int:
        # What is left of three siblings, one of which a lowering has taken away, is worth fusing still.
        return self.minimum - 1 if whom == "all" else self.minimum


class _SideBySide(RowTensor):
    """Matrices of equal height, [in, out_i], joined along their columns."""

    def __init__(self, name: str, parts: list[ir.TensorProtocol]) -> None:
        shapes = [part.shape.numpy() for part in parts]
        # Rows of a quantised part come in blocks; a chunk takes whole blocks of every part.
        row_block = math.lcm(*(part.row_block for part in parts if isinstance(part, RowTensor)))
        super().__init__(name, parts[0].dtype, (shapes[0][0], sum(width for _, width in shapes)), row_block=row_block)
        self._parts = parts

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        joined = np.empty((stop - start, self.shape.numpy()[1]), self.dtype.numpy()) if out is None else out
        first = 0
        for part in self._parts:
            columns = joined[:, first : first + part.shape.numpy()[1]]
            made = read_rows(part, start, stop, columns)
            if made is not columns:
                columns[:] = made
            first += columns.shape[1]
        return joined

    @property
    def makes_rows(self) -> bool:
        return True

    def release(self) -> None:
        for part in self._parts:
            if isinstance(part, RowTensor):
                part.release()


def _is_fusible(node: ir.Node, graph: ir.Graph) -> bool:
    if not is_op(node, "MatMul"):
        return False
    weight = node.inputs[1]
    return (
        weight is not None
        and weight.name in graph.initializers
        and not weight.is_graph_input()
        and weight.const_value is not None
        and len(weight.const_value.shape) == 2
        and len(weight.uses()) == 1
    )


def _fuse(graph: ir.Graph, nodes: list[ir.Node], unique: Callable[[str], str]) -> None:
    # One multiplication in the first one's place, its matrix joined row by row when it is written. Matrices belong to
    # the main graph wherever they are read.
    first, scope = nodes[0], nodes[0].graph
    assert isinstance(scope, ir.Graph), "weights of functions are no initializers"
    weights = [node.inputs[1] for node in nodes]
    tensors = [weight.const_value for weight in weights if weight is not None and weight.const_value is not None]
    name = _joined_name([node.name or "" for node in nodes])
    weight = _initializer(graph, _SideBySide(unique(f"{name}.weight"), tensors))
    sizes = np.array([tensor.shape[1] for tensor in tensors], np.int64)
    split_sizes = _initializer(graph, ir.tensor(sizes, name=unique(f"{name}.sizes")))
    made_by = {PASS_KEY: FuseSiblingMatMulsPass.__name__}
    fused = ir.node("MatMul", [first.inputs[0], weight], name=name, metadata_props=dict(made_by))
    fused.outputs[0].name = name
    fused.outputs[0].type = first.outputs[0].type
    split = ir.node(
        "Split",
        [fused.outputs[0], split_sizes],
        {"axis": -1},
        num_outputs=len(nodes),
        name=f"{name}.split",
        metadata_props=dict(made_by),
    )
    scope.insert_before(first, [fused, split])

    # The parts of the split take the place, type and name of the old outputs; the old nodes and weights are gone.
    for node, output in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        output.type, output.shape = old.type, old.shape
        replace_value(old, output)
    scope.remove(nodes, safe=True)
    for value in weights:
        del graph.initializers[value.name]  # type: ignore[union-attr,arg-type]  # checked by _is_fusible


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.val(tensor.name or "", const_value=tensor)
    graph.register_initializer(value)
    return value


def _joined_name(names: list[str]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj` for three names with that common parent."""
    parent, _, leaf = names[0].rpartition(".")
    leaves = [leaf, *(name.removeprefix(f"{parent}.") for name in names[1:])]
    return f"{parent}.{'+'.join(leaves)}" if parent else "+".join(leaves)
