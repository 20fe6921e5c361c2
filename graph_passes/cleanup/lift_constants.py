"""Make every large constant an initializer of the main graph."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.naming import unique_names
from dlo_export.graph_passes.spec.pass_contract import Border, GraphPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY


@dataclasses.dataclass(frozen=True)
class LiftConstantsPass(GraphPass):
    """Make large constants initializers of the main graph, wherever they stand.

    Before::

        <float[64,64] default = …>                       # an input that may be left out
        w = Constant <value = …> ()
        y = If (c) <then_branch = <float[64,64] v = …> {…}, …>

    After::

        <float[64,64] default = …, float[64,64] w = …, float[64,64] v = …>

    Weights are looked for, and written to the data file, as initializers of the main graph: what a Constant or a
    subgraph holds would stay where it is, and if it refers to a data file, refer to other bytes beside the new graph.
    An initializer that is also an input is a default that callers may replace; here it becomes what it is by default.
    Optional: a graph without any of them is left alone. Scope: main graph and subgraphs.

    Attributes:
        minimum_bytes: Size of the smallest Constant that is lifted.
    """

    nodes_from: ClassVar[Border | None] = "plain"

    minimum_bytes: int = 257

    def rewrite(self, model: ir.Model) -> bool:
        """Lift every one."""
        lift = _Lift(model.graph, self.minimum_bytes)
        steps = [step(graph) for graph in list(model.graphs()) for step in (lift.inputs, lift.constants)]
        return any(steps)


class _Lift:
    """Where constants go, and which names are free there."""

    def __init__(self, main: ir.Graph, minimum_bytes: int) -> None:
        self.main = main
        self.minimum_bytes = minimum_bytes
        self.unique = unique_names(main)

    def inputs(self, graph: ir.Graph) -> bool:
        """Takes initializers out of the graph's inputs."""
        kept = [value for value in graph.inputs if not value.is_initializer()]
        if changed := len(kept) < len(graph.inputs):
            graph.inputs[:] = kept
        return self._initializers(graph) or changed

    def constants(self, graph: ir.Graph) -> bool:
        """Replaces large Constant nodes."""
        found = [(node, tensor) for node in graph if (tensor := self._large_tensor(node)) is not None]
        for node, tensor in found:
            old = node.outputs[0]
            self._replace(graph, old, tensor, before=node)
            graph.remove(node, safe=True)
        return bool(found)

    def _initializers(self, graph: ir.Graph) -> bool:
        if graph is self.main:
            return False
        values = list(graph.initializers.values())
        for value in values:
            assert value.const_value is not None, "the reader has seen its contents"
            del graph.initializers[value.name]  # type: ignore[arg-type]  # initializers have names
            self._replace(graph, value, value.const_value, before=None)
        return bool(values)

    def _replace(self, graph: ir.Graph, old: ir.Value, tensor: ir.TensorProtocol, before: ir.Node | None) -> None:
        name, is_output = old.name or "constant", old.is_graph_output()
        old.name = self.unique(f"{name}.lifted")
        lifted = ir.val(name if graph is self.main and not is_output else self.unique(name), const_value=tensor)
        self.main.register_initializer(lifted)
        for use in tuple(old.uses()):
            use.node.replace_input_with(use.idx, lifted)
        if not is_output:
            return
        # What a graph gives out is computed in it, or runtimes refuse it: an Identity passes the constant on.
        node = ir.node("Identity", [lifted], name=self.unique(f"{name}.given_out"))
        node.metadata_props[PASS_KEY] = LiftConstantsPass.__name__
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, old.type, old.shape
        if before is None:
            graph.append(node)
        else:
            graph.insert_before(before, node)
        graph.outputs[:] = [node.outputs[0] if value is old else value for value in graph.outputs]

    def _large_tensor(self, node: ir.Node) -> ir.TensorProtocol | None:
        if not is_op(node, "Constant") or (value := node.attributes.get("value")) is None or value.is_ref():
            return None
        tensor = value.as_tensor()
        if tensor.dtype == ir.DataType.STRING:
            return None
        return tensor if tensor.nbytes >= self.minimum_bytes else None
