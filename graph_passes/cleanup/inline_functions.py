"""Put the bodies of model-local functions where they are called."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import GraphPass

# A hundred times what the largest graphs have. Functions that call each other twice make billions of a few lines.
MOST_NODES = 1_000_000


@dataclasses.dataclass(frozen=True)
class InlineFunctionsPass(GraphPass):
    """Put the bodies of model-local functions where they are called, and drop the functions.

    Before::

        y = custom.mlp (x, w)
        custom.mlp (a, b) => (c) { c = MatMul (a, b) }

    After::

        y = MatMul (x, w)

    Layers are found by the operators they consist of, and a function's constants have no place in the data file.
    A function that stands in for an operator of the runtime's own, for those that lack it, is not what the runtime
    computes: it has a kernel, which may round in another way. Such functions stay, and so do their calls. Optional: a
    graph without others is left alone. Scope: the whole model.

    Attributes:
        stand_ins: Names of the functions that stay, in ONNX Runtime's domain.
    """

    stand_ins: tuple[str, ...] = ()

    def rewrite(self, model: ir.Model) -> bool:
        """Inline all of them.

        Raises:
            GraphPassError: A function calls itself, or of two domains' operator sets one function needs another version
                than the graph; or they would make more than `MOST_NODES` nodes.
        """
        staying = {name for name in model.functions if name[0] == MICROSOFT and name[1] in self.stand_ins}
        if not model.functions.keys() - staying:
            return False
        if (count := _inlined_nodes(model, staying)) > MOST_NODES:
            raise GraphPassError(
                f"InlineFunctionsPass: the model-local functions make {count} nodes, expected at most {MOST_NODES}",
                hint="export the graph without functions",
            )
        try:
            InlinePass(lambda function: function.identifier() not in staying)(model)
        except (ir.passes.InvariantError, ir.passes.PassError, ValueError) as err:
            raise GraphPassError(
                f"InlineFunctionsPass: the model-local functions cannot be inlined: {err.__cause__ or err}",
                hint="export the graph without functions",
            ) from err
        for name in model.functions.keys() - staying:  # those that nothing calls
            del model.functions[name]
        return True


def _inlined_nodes(model: ir.Model, staying: Collection[ir.OperatorIdentifier]) -> int:
    """Nodes there would be; those of the graph as it is where a function calls itself, which the inliner tells of.

    Args:
        model: With its functions.
        staying: Functions that are not inlined.
    """
    operators = {
        name: collections.Counter(node.op_identifier() for node in function.all_nodes())
        for name, function in model.functions.items()
        if name not in staying
    }
    sizes: dict[ir.OperatorIdentifier, int] = {}
    try:
        # Those that are called come first.
        for name in TopologicalSorter({name: calls.keys() for name, calls in operators.items()}).static_order():
            if name in operators:
                sizes[name] = sum(count * sizes.get(called, 1) for called, count in operators[name].items())
    except CycleError:
        return len([*model.graph.all_nodes()])
    return sum(sizes.get(node.op_identifier(), 1) for node in model.graph.all_nodes())
